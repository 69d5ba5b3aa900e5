"""4-bit and 8-bit block quantization: every backend against the reference and against bitsandbytes, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import peers
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyqlora import _C
from pyqlora.ops import backend as dispatch
from pyqlora.ops import quantize as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # 8 bits: from 64 on
SIZES = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 192, 4095, 4096, 4097, 8191)  # 192: ends in a block of zeros


def weights(n, dtype, seed=0):
    """Normal values, and what formats trip over: zero blocks, tiny ones, negative zeros, midpoints of the table."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x[3::97] = 1e-41
    x[5::31] = -0.0
    x[128:192] = 0.0
    x[192:256] *= 1e-30
    if n >= 288:
        table = reference.table("nf4")
        x[256:288] = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.ones(1)])
    return x.to(dtype)


def cubic_map():
    """256 ascending values, denser towards zero, not symmetric, without -1: shaped like the dynamic map."""
    return torch.linspace(-1, 1, 257)[1:] ** 3


def equal(a, b):
    """Same dtype, shape and bits, any NaN being as good as another."""
    same = a.dtype == b.dtype and a.shape == b.shape and a.isnan().equal(b.isnan())
    return same and a.nan_to_num(nan=0.0).equal(b.nan_to_num(nan=0.0))


def quantize_4bit(backend, x, blocksize, quant_type):
    packed, absmax = ops.quantize_4bit(x.to(backend.device), blocksize, quant_type)
    return packed.cpu(), absmax.cpu()


def dequantize_4bit(backend, packed, scales, blocksize, quant_type, shape, dtype):
    """scales: (absmax,) or (absmax, nested_absmax, nested_code, offset, nested_blocksize)."""
    absmax, nested_absmax, nested_code, offset, nested_blocksize = (*scales, None, None, None, 256)[:5]
    tensors = (packed, absmax, nested_absmax, nested_code, offset)
    tensors = [None if t is None else t.to(backend.device) for t in tensors]
    return ops.dequantize_4bit(*tensors, nested_blocksize, blocksize, quant_type, shape, dtype).cpu()


def quantize_blockwise(backend, x, code, blocksize):
    q, absmax = ops.quantize_blockwise(x.to(backend.device), code.to(backend.device), blocksize)
    return q.cpu(), absmax.cpu()


def dequantize_blockwise(backend, q, code, absmax, blocksize, dtype):
    tensors = [t.to(backend.device) for t in (q, code, absmax)]
    return ops.dequantize_blockwise(*tensors, blocksize, dtype).cpu()


def check_4bit(backend, x, blocksize, quant_type):
    packed, absmax = quantize_4bit(backend, x, blocksize, quant_type)
    expected_packed, expected_absmax = reference.quantize_4bit(x, blocksize, quant_type, on_gpu=backend.name != "cpu")
    assert packed.equal(expected_packed)
    assert equal(absmax, expected_absmax)
    shape = list(x.shape)
    decoded = dequantize_4bit(backend, packed, (absmax,), blocksize, quant_type, shape, x.dtype)
    assert equal(decoded, reference.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype))


def check_blockwise(backend, x, code, blocksize):
    q, absmax = quantize_blockwise(backend, x, code, blocksize)
    expected_q, expected_absmax = reference.quantize_blockwise(x, code, blocksize, on_gpu=backend.name != "cpu")
    assert q.equal(expected_q)
    assert equal(absmax, expected_absmax)
    decoded = dequantize_blockwise(backend, q, code, absmax, blocksize, x.dtype)
    assert equal(decoded, reference.dequantize_blockwise(q, code, absmax, blocksize, x.dtype))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_4bit(backend, blocksize, dtype, quant_type):
    for n in (1, blocksize - 1, blocksize, blocksize + 1, 4096 + 7):
        check_4bit(backend, weights(n, dtype), blocksize, quant_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4bit_sizes(backend, dtype):
    for n in SIZES:
        check_4bit(backend, weights(n, dtype, seed=n), 64, "nf4")
    check_4bit(backend, weights(15 * 21, dtype).view(3, 5, 21), 64, "nf4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES[1:])
def test_blockwise(backend, blocksize, dtype):
    for n in (1, blocksize - 1, blocksize, blocksize + 1, 4096 + 7):
        check_blockwise(backend, weights(n, dtype), cubic_map(), blocksize)


def test_ties(backend):
    """Halfway between two values."""
    for quant_type in QUANT_TYPES:
        values = reference.table(quant_type).sort().values
        bounds = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor(reference.GPU_BOUNDS[quant_type])])
        x = torch.cat([bounds, -bounds, torch.tensor([0.0, -0.0, 1.0])])
        check_4bit(backend, torch.nn.functional.pad(x, (0, 64 - len(x))), 64, quant_type)
        check_4bit(backend, torch.linspace(-1, 1, 4096), 4096, quant_type)  # and all the way between
    code = cubic_map()
    check_blockwise(backend, torch.cat([(code[1:] + code[:-1]) * 0.5, torch.ones(1)]), code, 256)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
def test_special_values(backend, special):
    for n in (5, 64, 200):
        x = weights(n, torch.float32)
        x[[0, n - 1]] = special
        for quant_type in QUANT_TYPES:
            check_4bit(backend, x, 64, quant_type)
        check_blockwise(backend, x, cubic_map(), 64)


def test_empty(backend):
    packed, absmax = quantize_4bit(backend, torch.empty(0, 3), 64, "nf4")
    assert packed.shape == (0, 1) and absmax.shape == (0,)
    assert dequantize_4bit(backend, packed, (absmax,), 64, "nf4", [0, 3], torch.float16).shape == (0, 3)
    q, absmax = quantize_blockwise(backend, torch.empty(0, 3), cubic_map(), 64)
    assert q.shape == (0, 3) and absmax.shape == (0,)


def test_strided_and_misaligned_inputs(backend):
    """A transposed weight is made contiguous; a view that starts anywhere takes the path without 16-byte accesses."""
    x = weights(640, torch.bfloat16)
    check_4bit(backend, x.view(20, 32).t(), 32, "nf4")
    for first in (1, 2, 5, 8):
        check_4bit(backend, x[first:], 64, "nf4")
        check_blockwise(backend, x[first:], cubic_map(), 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_byte_decodes(backend, quant_type, dtype):
    packed = torch.arange(256).to(torch.uint8).repeat(33)
    absmax = weights(264, torch.float32).abs()
    decoded = dequantize_4bit(backend, packed, (absmax,), 64, quant_type, [len(packed) * 2], dtype)
    assert equal(decoded, reference.dequantize_4bit(packed, absmax, 64, quant_type, [len(packed) * 2], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested_blocksize", [64, 256])
def test_nested_scales(backend, nested_blocksize, dtype):
    """Double quantization is decoded in the same pass, to the same bits as in two."""
    n = 32 * 300 + 5
    packed, absmax = reference.quantize_4bit(weights(n, torch.float32), 32, "nf4")
    code, offset = cubic_map(), absmax.mean().reshape(1)
    q, nested_absmax = reference.quantize_blockwise(absmax - offset, code, nested_blocksize)
    nested = (q, nested_absmax, code, offset, nested_blocksize)
    decoded = dequantize_4bit(backend, packed, nested, 32, "nf4", [n], dtype)
    scales = reference.scales(*nested)
    assert equal(decoded, reference.dequantize_4bit(packed, scales, 32, "nf4", [n], dtype))


def test_windows(backend):
    """Any window of elements decodes to that part of the whole."""
    n = 20000
    packed, absmax = reference.quantize_4bit(weights(n, torch.float32), 64, "nf4")
    whole = reference.dequantize_4bit(packed, absmax, 64, "nf4", [n], torch.bfloat16)
    for first, count in ((0, 1), (1, 2), (63, 66), (64, 8192), (8, 8200), (9, 8192), (19999, 1), (0, n)):
        out = torch.empty(count, dtype=torch.bfloat16, device=backend.device)
        tensors = (out, packed.to(backend.device), absmax.to(backend.device), None, None, None)
        ops.dequantize_4bit_into(*tensors, 256, 64, "nf4", n, first)
        assert equal(out.cpu(), whole[first : first + count]), (first, count)


def check_rows(backend, dtype, nested, size, begin, first, blocksize=64):
    """Elements from `first` on into rows of a buffer that begin at its element `begin`; size: (rows, columns, stride).
    Nothing else of the buffer changes."""
    count, columns, stride = size
    n = first + count * columns + 3
    packed, absmax = reference.quantize_4bit(weights(n, torch.float32), blocksize, "nf4")
    scales = (absmax, None, None, None, 256)
    if nested:
        code, offset = cubic_map(), absmax.mean().reshape(1)
        q, nested_absmax = reference.quantize_blockwise(absmax - offset, code, 64)
        scales = (q, nested_absmax, code, offset, 64)
        absmax = reference.scales(*scales)
    whole = reference.dequantize_4bit(packed, absmax, blocksize, "nf4", [n], dtype)
    buffer = torch.full((begin + count * stride + 9,), 7.0, dtype=dtype, device=backend.device)
    expected = buffer.cpu().clone()
    expected.as_strided((count, columns), (stride, 1), begin).copy_(whole[first : n - 3].view(count, columns))
    tensors = [t.to(backend.device) if isinstance(t, torch.Tensor) else t for t in (packed, *scales)]
    out = buffer.as_strided((count, columns), (stride, 1), begin)
    assert ops.dequantize_4bit_into(out, *tensors, blocksize, "nf4", n, first) is out
    assert equal(buffer.cpu(), expected), (size, begin, first, blocksize)


ROWS = (  # (rows, columns, stride), the first row's begin, the window's
    ((40, 256, 264), 8, 0),  # a tile of whole vectors and a part of one
    ((40, 256, 264), 8, 72),  # a window on another block
    ((40, 256, 264), 8, 5),  # codes that do not begin with a word
    ((40, 256, 264), 3, 8),  # rows that do not begin at 16 bytes
    ((40, 256, 261), 8, 8),  # each at another place
    ((3, 8192, 9000), 0, 0),  # rows of a tile
    ((342, 24, 32), 0, 0),  # many rows to a thread's step, which is no multiple of them
    ((80, 100, 104), 0, 0),  # a tail in each row of a tile
    ((30, 100, 104), 0, 1),
    ((30, 37, 41), 1, 63),  # everything odd
    ((300, 8, 16), 0, 0),
    ((90, 7, 8), 0, 0),  # no whole vector
    ((90, 1, 2), 1, 0),
    ((1, 8200, 8200), 5, 0),  # contiguous, but not where 16 bytes begin
    ((1, 3, 3), 1, 9),
)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(backend, dtype, nested):
    """A view with gaps between its rows, as a workspace's first columns: the same bits, and the gaps stay."""
    for size, begin, first in ROWS:
        check_rows(backend, dtype, nested, size, begin, first)


@given(data=st.data())
def test_any_rows(backend, data):
    columns = data.draw(st.integers(1, 70))
    size = (data.draw(st.integers(1, 40)), columns, columns + data.draw(st.integers(0, 20)))
    begin, first = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 70))
    dtype, nested = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    check_rows(backend, dtype, nested, size, begin, first, data.draw(st.sampled_from(BLOCKSIZES)))


def test_rows_of_more_than_two_dimensions(backend):
    """Evenly spaced rows of any shape: a dimension of one and an empty tensor among them."""
    packed, absmax = quantize_4bit(backend, weights(960, torch.float32), 64, "nf4")
    arguments = [t.to(backend.device) for t in (packed, absmax)] + [None, None, None, 256, 64, "nf4", 960]
    whole = reference.dequantize_4bit(packed, absmax, 64, "nf4", [960], torch.float16)
    for shape, view in (
        ((4, 3, 100), lambda t: t[..., :80]),
        ((4, 5, 1, 80), lambda t: t[:, 1:4]),
        ((1, 12, 1, 90), lambda t: t[..., 5:85]),
        ((960, 2), lambda t: t[:, 1]),
        ((12, 80), lambda t: t[:, :0]),
    ):
        buffer = torch.zeros(shape, dtype=torch.float16, device=backend.device)
        expected = torch.zeros(shape, dtype=torch.float16)
        part = view(expected)
        part.copy_(whole[: part.numel()].view(part.shape))
        ops.dequantize_4bit_into(view(buffer), *arguments)
        assert equal(buffer.cpu(), expected), shape


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def bitsandbytes_functional():
    """Without torch.compile, which bitsandbytes tries for some shapes and which takes minutes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("torch before 2.6 cannot turn compilation off")
    with torch.compiler.set_stance("force_eager"):
        yield functional


def for_peers(backend, x):
    """Without what bitsandbytes' CUDA code, compiled for speed, takes for zero or infinite."""
    if backend.name == "cpu":
        return x
    return x.float().masked_fill(x.abs() < 1e-30, 0.0).clamp(-1e30, 1e30).to(x.dtype)


def only_ties_differ(codes, theirs, x, absmax, blocksize, bounds):
    """Whether two encodings of x are one but for what lies halfway between two values, up to the rounding of their
    CUDA code's approximate reciprocal and of the product; and for their code in blocks of zeros, which is that of -1.
    """
    scale = absmax.repeat_interleave(blocksize)[: x.numel()].double()
    off = (x.double() / scale)[(codes != theirs) & (scale > 0)]
    return bool(((off[:, None] - bounds.double()).abs() <= 2**-22 * off.abs()[:, None]).any(1).all())


@given(data=st.data())
def test_4bit_equals_bitsandbytes(backend, bitsandbytes_functional, data):
    """On the same device."""
    F = bitsandbytes_functional
    blocksize, dtype = data.draw(st.sampled_from(BLOCKSIZES)), data.draw(st.sampled_from(DTYPES))
    quant_type, nested = data.draw(st.sampled_from(QUANT_TYPES)), data.draw(st.booleans())
    values = data.draw(st.lists(floats, min_size=1, max_size=30))
    n = data.draw(st.sampled_from((len(values), blocksize, blocksize + 1, 3 * blocksize - 1, 64 * 256 + 65)))
    x = torch.cat([weights(n, torch.float32), torch.tensor(values)])[-n:].to(dtype).nan_to_num()
    if backend.emulated:
        return check_4bit(backend, x, blocksize, quant_type)
    x = for_peers(backend, x)
    packed, absmax = quantize_4bit(backend, x, blocksize, quant_type)
    theirs, state = F.quantize_4bit(x.to(backend.device), None, None, blocksize, nested, quant_type)
    theirs = theirs.cpu()
    state.to("cpu")
    if backend.name == "cpu":
        assert packed.equal(theirs)
    else:
        codes = [torch.stack([p.flatten() >> 4, p.flatten() & 15], 1).flatten()[:n] for p in (packed, theirs)]
        bounds = torch.tensor(reference.GPU_BOUNDS[quant_type])
        assert only_ties_differ(*codes, x, absmax, blocksize, torch.cat([bounds, -bounds]))
        packed = theirs
    scales = (absmax,)
    if nested:
        code, offset = F.create_dynamic_map(), state.offset.reshape(1)
        torch.testing.assert_close(offset[0], absmax.mean())
        q, nested_absmax = quantize_blockwise(backend, absmax - offset, code, 256)
        assert nested_absmax.equal(state.state2.absmax)
        if backend.name == "cpu":
            assert q.equal(state.absmax)
        else:
            midpoints = (code[1:] + code[:-1]) / 2
            assert only_ties_differ(q, state.absmax, absmax - offset, nested_absmax, 256, midpoints)
        scales = (state.absmax, nested_absmax, code, offset, 256)
    else:
        assert absmax.equal(state.absmax)
    decoded, exact = (
        dequantize_4bit(backend, packed, scales, blocksize, quant_type, [n], d) for d in (dtype, torch.float32)
    )
    expected = F.dequantize_4bit(theirs, state).flatten()  # theirs turns one packed byte into a column
    assert peers.decoded_alike(decoded, expected, exact)


@given(data=st.data())
def test_blockwise_equals_bitsandbytes(backend, bitsandbytes_functional, data):
    """On the same device."""
    if backend.emulated:
        pytest.skip("bitsandbytes' CUDA code needs a GPU; the reference says what it does")
    F = bitsandbytes_functional
    blocksize, dtype = data.draw(st.sampled_from(BLOCKSIZES[1:])), data.draw(st.sampled_from(DTYPES))
    code = F.create_dynamic_map(signed=data.draw(st.booleans()))
    values = data.draw(st.lists(floats, min_size=1, max_size=30))
    n = data.draw(st.sampled_from((len(values), blocksize, blocksize + 1, 3 * blocksize - 1)))
    x = torch.cat([weights(n, torch.float32), torch.tensor(values)])[-n:].to(dtype).nan_to_num()
    x = for_peers(backend, x)
    q, absmax = quantize_blockwise(backend, x, code, blocksize)
    theirs, state = F.quantize_blockwise(x.to(backend.device), code.to(backend.device), blocksize=blocksize)
    theirs = theirs.cpu()
    state.to("cpu")
    assert absmax.equal(state.absmax)
    if backend.name == "cpu":
        assert q.equal(theirs)
    else:
        assert only_ties_differ(q, theirs, x, absmax, blocksize, (code[1:] + code[:-1]) / 2)
        q = theirs
    decoded, exact = (dequantize_blockwise(backend, q, code, absmax, blocksize, d) for d in (dtype, torch.float32))
    state.dtype = dtype
    assert peers.decoded_alike(decoded, F.dequantize_blockwise(theirs, state), exact)


@pytest.mark.parametrize("isa", _C.cpu.supported_isas())
def test_every_instruction_set(isa):
    before = _C.cpu.isa()
    try:
        _C.cpu.set_isa(isa)
        cpu = SimpleNamespace(name="cpu", device=torch.device("cpu"))
        for dtype in DTYPES:
            for n in SIZES:
                for quant_type in QUANT_TYPES:
                    check_4bit(cpu, weights(n, dtype, seed=n), 64, quant_type)
                check_blockwise(cpu, weights(n, dtype, seed=n), cubic_map(), 256)
    finally:
        _C.cpu.set_isa(before)


def call(name, **changes):
    """A native call with valid arguments but for the changes."""
    x, absmax, code = torch.zeros(100), torch.zeros(2), torch.zeros(256)
    arguments = {
        "quantize_4bit": {"x": x, "packed": torch.zeros(50, dtype=torch.uint8), "absmax": absmax, "blocksize": 64},
        "dequantize_4bit": {"packed": torch.zeros(50, dtype=torch.uint8), "absmax": absmax, "nested_absmax": None}
        | {"nested_code": None, "offset": None, "nested_blocksize": 256, "out": x, "numel": 100, "first": 0}
        | {"blocksize": 64},
        "quantize_blockwise": {"x": x, "code": code, "q": torch.zeros(100, dtype=torch.uint8), "absmax": absmax}
        | {"blocksize": 64},
        "dequantize_blockwise": {"q": torch.zeros(100, dtype=torch.uint8), "code": code, "absmax": absmax, "out": x}
        | {"blocksize": 64},
    }[name]
    if name.endswith("4bit"):
        arguments["quant_type"] = "nf4"
    module, context = dispatch.native(x)
    getattr(module, name)(*(arguments | changes).values(), context)


NESTED = {"absmax": torch.zeros(2, dtype=torch.uint8), "nested_absmax": torch.zeros(1)}
NESTED |= {"nested_code": torch.zeros(256), "offset": torch.zeros(1)}
NO_ROWS = r"out: expected a contiguous tensor, or rows of one as in buffer\[:, :columns\], got one with other strides"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("quantize_4bit", {"blocksize": 48}, "blocksize: expected a power of two from 32 to 4096, got 48"),
        ("quantize_4bit", {"blocksize": 16}, "blocksize: expected a power of two from 32 to 4096, got 16"),
        ("quantize_4bit", {"blocksize": 8192}, "blocksize: expected a power of two from 32 to 4096, got 8192"),
        ("quantize_4bit", {"x": None}, "x: expected a tensor, got None"),
        ("quantize_4bit", {"x": torch.zeros(100).double()}, "x: expected float32 or float16 or bfloat16, got another"),
        ("quantize_4bit", {"x": torch.zeros(200)[::2]}, "x: expected a contiguous tensor, got a strided one"),
        ("quantize_4bit", {"packed": torch.zeros(49).byte()}, "packed: expected 50 elements, got 49"),
        ("quantize_4bit", {"absmax": torch.zeros(3)}, "absmax: expected 2 elements, got 3"),
        ("quantize_4bit", {"quant_type": "int4"}, "quant_type: expected 'nf4' or 'fp4', got 'int4'"),
        ("dequantize_4bit", {"packed": torch.zeros(50)}, "packed: expected uint8, got float32"),
        ("dequantize_4bit", {"blocksize": 65}, "blocksize: expected a power of two from 32 to 4096, got 65"),
        ("dequantize_4bit", {"absmax": torch.zeros(2).byte()}, "absmax: expected float32, got uint8"),
        ("dequantize_4bit", NESTED | {"absmax": torch.zeros(2)}, "absmax: expected uint8, got float32"),
        ("dequantize_4bit", NESTED | {"nested_code": None}, "nested_code: expected a tensor, got None"),
        ("dequantize_4bit", NESTED | {"nested_absmax": torch.zeros(2)}, "nested_absmax: expected 1 elements, got 2"),
        ("dequantize_4bit", NESTED | {"nested_blocksize": 32}, "a power of two from 64 to 4096, got 32"),
        ("dequantize_4bit", NESTED | {"offset": torch.zeros(2)}, "offset: expected 1 elements, got 2"),
        ("dequantize_4bit", {"first": 1}, r"first: expected a window inside 100 elements, got \[1, 101\)"),
        ("dequantize_4bit", {"first": -1}, r"first: expected a window inside 100 elements, got \[-1, 99\)"),
        ("dequantize_4bit", {"out": None}, "out: expected a tensor, got None"),
        ("dequantize_4bit", {"out": torch.zeros(100).int()}, "out: expected float32 or float16 or bfloat16, got int32"),
        ("dequantize_4bit", {"out": torch.zeros(20, 5).t()}, NO_ROWS),
        ("dequantize_4bit", {"out": torch.zeros(20, 1).expand(20, 5)}, NO_ROWS),
        ("dequantize_4bit", {"out": torch.zeros(5).expand(20, 5)}, NO_ROWS),
        ("dequantize_4bit", {"out": torch.zeros(99).as_strided((20, 5), (4, 1))}, NO_ROWS),
        ("dequantize_4bit", {"out": torch.zeros(5, 6, 7)[:, :4, :5]}, NO_ROWS),
        ("quantize_blockwise", {"blocksize": 32}, r"blocksize: expected a power of two from 64 to \d+, got 32"),
        ("quantize_blockwise", {"code": torch.zeros(16)}, "code: expected 256 elements, got 16"),
        ("quantize_blockwise", {"q": torch.zeros(99).byte()}, "q: expected 100 elements, got 99"),
        ("dequantize_blockwise", {"absmax": torch.zeros(1)}, "absmax: expected 2 elements, got 1"),
        ("dequantize_blockwise", {"out": torch.zeros(99)}, "out: expected 100 elements, got 99"),
    ],
)
def test_errors(name, changes, message):
    with pytest.raises(ValueError, match=f"^({name}: )?.*{message}"):
        call(name, **changes)


def test_error_on_another_device():
    with pytest.raises(ValueError, match="kernels for cpu and cuda tensors, got one on meta"):
        dispatch.native(torch.empty(1, device="meta"))


@pytest.mark.parametrize("nested", [False, True])
def test_operators_are_registered_correctly(nested):
    x, code = weights(300, torch.float32), cubic_map()
    library = torch.ops.pyqlora
    torch.library.opcheck(library.quantize_4bit, (x, 64, "nf4"))
    torch.library.opcheck(library.quantize_blockwise, (x, code, 64))
    packed, absmax = ops.quantize_4bit(x, 64, "nf4")
    q, q_absmax = ops.quantize_blockwise(absmax, code, 64)
    torch.library.opcheck(library.dequantize_blockwise, (q, code, q_absmax, 64, torch.float16))
    scales = (q, q_absmax, code, torch.zeros(1), 64) if nested else (absmax, None, None, None, 256)
    torch.library.opcheck(library.dequantize_4bit, (packed, *scales, 64, "nf4", [300], torch.bfloat16))
