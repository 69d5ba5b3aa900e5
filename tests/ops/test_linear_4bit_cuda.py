"""The GPU kernels of linear_4bit, called directly, against float64."""

from __future__ import annotations

import pytest
import reference
import torch

from pyqlora.ops import linear_4bit_cuda
from pyqlora.ops.backend import native
from pyqlora.ops.linear_4bit import linear_4bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one unit in the last place


@pytest.fixture
def gpu(backend):
    if backend.name == "cpu":
        pytest.skip("kernels of the GPU")
    return backend


def weight_of(n, k, blocksize, quant_type="nf4", nested=False, seed=0):
    """A packed weight of random bytes with random scales, and its values in float64."""
    random = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // blocksize)
    packed = torch.randint(256, ((n * k + 1) // 2, 1), generator=random, dtype=torch.uint8)
    if nested:
        absmax = torch.randint(256, (blocks,), generator=random, dtype=torch.uint8)
        nested_absmax = torch.rand(-(-blocks // 256), generator=random)
        nested_code = torch.rand(256, generator=random).sort().values
        constants = absmax, nested_absmax, nested_code, torch.tensor(0.25), 256
        scales = reference.scales(*constants)
    else:
        scales = 0.1 + torch.rand(blocks, generator=random)
        constants = scales, None, None, None, 256
    values = reference.dequantize_4bit(packed, scales, blocksize, quant_type, (n, k), torch.float64)
    return (packed, *constants, blocksize, quant_type), values


def to(device, weight):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in weight)


def check(kernel, gpu, dtype, m, n, k, blocksize, quant_type="nf4", nested=False, bias=True, decoding=0.0):
    """Compare with float64; `decoding` is the error of a weight before it is multiplied."""
    weight, values = weight_of(n, k, blocksize, quant_type, nested)
    random = torch.Generator().manual_seed(1)
    x = torch.randn((m, k), generator=random).to(dtype)
    b = torch.randn(n, generator=random).to(dtype) if bias else None
    y = kernel(x.to(gpu.device), to(gpu.device, weight), [n, k], None if b is None else b.to(gpu.device))
    assert y.dtype == dtype and y.shape == (m, n)
    expected = x.double() @ values.T
    if bias:
        expected += b.double()
    # float32 sums of at most some dozen terms in a row, then one rounding to the output.
    products = x.double().abs() @ values.abs().T
    bound = products * (decoding + 64 * 2**-24) + expected.abs() * ROUNDING[dtype] + 2**-24
    error = (y.cpu().double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound at {(error / bound).argmax()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9])
def test_simt_rows(gpu, dtype, m):
    check(linear_4bit_cuda.simt, gpu, dtype, m, 5, 320, 64)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 31), (4, 33), (7, 65), (5, 127), (2, 264), (9, 300)])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_simt_shapes(gpu, n, k, blocksize, nested):
    check(linear_4bit_cuda.simt, gpu, torch.float32, 2, n, k, blocksize, nested=nested, bias=n % 2 == 1)


def test_simt_fp4(gpu):
    check(linear_4bit_cuda.simt, gpu, torch.float16, 3, 6, 100, 32, "fp4")


def test_simt_takes_misaligned_tensors(gpu):
    weight, values = weight_of(4, 64, 32)
    packed = torch.cat([weight[0][:1], weight[0]])[1:].to(gpu.device)
    x = torch.arange(65.0)[1:].view(1, 64).to(gpu.device)
    y = linear_4bit_cuda.simt(x, (packed, *to(gpu.device, weight)[1:]), [4, 64], None)
    torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ values.T, rtol=1e-5, atol=1e-3)


DECODING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a centroid as an operand of the tensor cores


def check_mma(gpu, dtype, *shape, **options):
    check(linear_4bit_cuda.mma, gpu, dtype, *shape, decoding=DECODING[dtype], **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64])
def test_mma_rows(gpu, dtype, m):
    check_mma(gpu, dtype, m, 40, 576, 64, nested=m % 2 == 0)


@pytest.mark.parametrize("m", [3, 12, 20, 40])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (15, 128), (33, 192), (129, 320), (24, 1088)])
def test_mma_shapes(gpu, m, n, k):
    check_mma(gpu, torch.bfloat16, m, n, k, 64, nested=n % 2 == 0, bias=n % 4 != 0)


@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_mma_blocks_run_over_the_ends_of_rows(gpu, blocksize, nested):
    check_mma(gpu, torch.float16, 5, 21, 832, blocksize, "fp4", nested=nested)


@pytest.mark.parametrize(("m", "splits"), [(4, 2), (9, 3), (40, 5)])
@pytest.mark.parametrize("n", [24, 35])
def test_mma_splits(gpu, monkeypatch, m, splits, n):
    monkeypatch.setattr(linear_4bit_cuda, "gpu_of", lambda device: (80, splits * -(-n // 32)))
    check_mma(gpu, torch.float16, m, n, 4160, 64, nested=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "rank"), [(1, 8), (2, 17), (8, 64), (9, 16), (31, 1), (33, 40), (64, 260)])
def test_mma_adds_a_low_rank_update(gpu, dtype, factor, m, rank):
    n, k = 45, 1088
    weight, values = weight_of(n, k, 64)
    random = torch.Generator().manual_seed(rank)
    x = torch.randn((m, k), generator=random).to(dtype)
    s, b = torch.randn((m, rank), generator=random).to(dtype), torch.randn((n, rank), generator=random).to(factor)
    update = s.to(gpu.device), b.to(gpu.device)
    y = linear_4bit_cuda.mma(x.to(gpu.device), to(gpu.device, weight), [n, k], None, update)
    expected = x.double() @ values.T + s.double() @ b.double().T
    products = x.double().abs() @ values.abs().T + s.double().abs() @ b.double().abs().T
    bound = products * (DECODING[dtype] + 64 * 2**-24) + expected.abs() * ROUNDING[dtype] + 2**-24
    assert ((y.cpu().double() - expected).abs() <= bound).all()


def test_mma_is_deterministic(gpu):
    weight, _ = weight_of(70, 1280, 64)
    x, weight = torch.randn(10, 1280, dtype=torch.bfloat16, device=gpu.device), to(gpu.device, weight)
    first, second = (linear_4bit_cuda.mma(x, weight, [70, 1280], None) for _ in range(2))
    assert torch.equal(first, second)


def test_mma_adds_splits_in_one_order(gpu, monkeypatch):
    """Equal rows of W give equal bits, whichever thread block adds them; a bias leaves the last bits to be seen."""
    k = 6144
    (packed, absmax, *rest), values = weight_of(1, k, 64)
    x = (100 * torch.randn(1, k, generator=torch.Generator().manual_seed(1))).half()
    bias = -(x.double() @ values.T).float().flatten()
    x = x.repeat(8, 1)
    x[range(8), range(0, k, k // 8)] += 0.0625  # eight sums near each other, which round differently

    def product(n, bias):
        monkeypatch.setattr(linear_4bit_cuda, "gpu_of", lambda device: (80, 3 * -(-n // 32)))
        weight = packed.repeat(n, 1), absmax.repeat(n), *rest
        bias = bias.expand(n).contiguous()
        return linear_4bit_cuda.mma(x.to(gpu.device), to(gpu.device, weight), [n, k], bias.to(gpu.device))

    bias -= product(8, bias)[:1, 0].cpu().float()  # near zero, where float16 holds every bit of the sums
    y = product(2056, bias)
    assert torch.equal(y, y[:, :1].expand_as(y))


@pytest.mark.parametrize("kernel", [linear_4bit_cuda.simt, linear_4bit_cuda.mma])
@pytest.mark.parametrize("scale", [0.0, torch.inf, torch.nan])
def test_a_scale_reaches_its_block_alone(gpu, kernel, scale):
    weight, _ = weight_of(20, 256, 64)
    x = torch.randn(9, 256, dtype=torch.float16)
    x[4, 100] = torch.inf
    weight[1][4 * 7 + 2] = scale
    values = reference.dequantize_4bit(weight[0], weight[1], 64, "nf4", (20, 256), torch.float64)
    y = kernel(x.to(gpu.device), to(gpu.device, weight), [20, 256], None).cpu().double()
    expected = x.double() @ values.T
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "x: expected float16 or bfloat16, got float32"),
        ({"m": 65}, "x: expected 1 to 64 rows, got 65"),
        ({"k": 96}, "shape: expected K a multiple of 64 and at most 16777216, got 96"),
        ({"blocksize": 32}, "blocksize: expected a power of two from 64 to 4096, got 32"),
        ({"shift": 1}, "x: expected a 16-byte aligned tensor"),
        ({"workspace": 9}, "workspace: expected a multiple of 8 elements, got 9"),
    ],
)
def test_mma_says_what_it_cannot_do(gpu, change, message):
    options = {"dtype": torch.float16, "m": 2, "k": 64, "blocksize": 64, "shift": 0, "workspace": None} | change
    m, k, shift = options["m"], options["k"], options["shift"]
    *weight, blocksize, quant_type = to(gpu.device, weight_of(4, k, options["blocksize"])[0])
    x = torch.zeros(m * k + shift, dtype=options["dtype"], device=gpu.device)[shift:].view(m, k)
    workspace = None if options["workspace"] is None else torch.zeros(options["workspace"], device=gpu.device)
    module, context = native(x)
    with pytest.raises(ValueError, match=f"^linear_4bit_mma: {message}"):
        y = x.new_empty((m, 4))
        module.linear_4bit_mma(x, *weight, None, y, 4, k, blocksize, quant_type, workspace, None, None, context)


def test_mma_refuses_bfloat16_before_ampere(gpu):
    if not gpu.emulated:
        pytest.skip("the emulated device's capability can be set")
    weight, _ = weight_of(4, 64, 64)
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    device = native(x)[0].module
    device.set_compute_capability(7)
    try:
        with pytest.raises(RuntimeError, match=r"^linear_4bit_mma: bfloat16 needs .* 8.0 or later, this one has 7.x"):
            linear_4bit_cuda.mma(x, weight, [4, 64], None)
    finally:
        device.set_compute_capability(8)


@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "dtype", "aligned", "capability", "way"),
    [
        (1, 4096, 4096, 64, torch.bfloat16, True, 80, "mma"),
        (64, 4096, 4096, 64, torch.bfloat16, True, 80, "mma"),
        (65, 4096, 4096, 64, torch.bfloat16, True, 80, "dequantize"),
        (64, 4096, 4096, 64, torch.bfloat16, True, 90, "mma"),
        (33, 256, 256, 64, torch.bfloat16, True, 90, "dequantize"),
        (16, 4096, 4096, 64, torch.bfloat16, True, 103, "mma"),
        (8, 256, 256, 64, torch.bfloat16, True, 80, "dequantize"),
        (1, 4096, 4096, 64, torch.bfloat16, True, 75, "simt"),
        (1, 4096, 4096, 64, torch.float16, True, 75, "mma"),
        (1, 4096, 4096, 64, torch.float32, True, 90, "simt"),
        (1, 4096, 4096, 32, torch.float16, True, 90, "simt"),
        (1, 4096, 4096, 64, torch.float16, False, 90, "simt"),
        (5, 4096, 4000, 64, torch.float16, True, 90, "dequantize"),
        (0, 4096, 4096, 64, torch.float16, True, 90, "simt"),
    ],
)
def test_choose(monkeypatch, m, n, k, blocksize, dtype, aligned, capability, way):
    monkeypatch.delenv("PYQLORA_LINEAR_4BIT", raising=False)
    choose = linear_4bit_cuda.choose.__wrapped__
    assert choose(m, n, k, blocksize, dtype, aligned, capability) == way


def test_choose_by_environment(monkeypatch):
    choose = linear_4bit_cuda.choose.__wrapped__
    shape = 1, 4096, 4096, 64, torch.float16, True, 90
    for way in ("simt", "mma", "dequantize"):
        monkeypatch.setenv("PYQLORA_LINEAR_4BIT", way)
        assert choose(*shape) == way
    monkeypatch.setenv("PYQLORA_LINEAR_4BIT", "mma")
    assert choose(65, *shape[1:]) == "dequantize"
    monkeypatch.setenv("PYQLORA_LINEAR_4BIT", "cublas")
    for wrong in ("cublas", "mma_rows=many", "rows=3"):
        monkeypatch.setenv("PYQLORA_LINEAR_4BIT", wrong)
        with pytest.raises(ValueError, match=f"PYQLORA_LINEAR_4BIT: expected simt, mma or deq.*, got '{wrong}'"):
            choose(*shape)


def test_thresholds_by_environment(monkeypatch):
    choose = linear_4bit_cuda.choose.__wrapped__
    monkeypatch.setenv("PYQLORA_LINEAR_4BIT", "mma_rows=20 simt_rows=7")
    rest = 4096, 4096, 64, torch.float16, True, 90
    assert [choose(m, *rest) for m in (20, 21)] == ["mma", "dequantize"]
    assert [choose(m, 4096, 4000, *rest[2:]) for m in (7, 8)] == ["simt", "dequantize"]


@pytest.mark.parametrize("m", [1, 70])
def test_the_operator_uses_them(gpu, m):
    weight, values = weight_of(40, 128, 64, nested=True)
    x, bias = torch.randn(m, 128, dtype=torch.float16), torch.randn(40, dtype=torch.float16)
    *constants, blocksize, quant_type = to(gpu.device, weight)
    y = linear_4bit(x.to(gpu.device), *constants, blocksize, quant_type, [40, 128], bias.to(gpu.device))
    torch.testing.assert_close(y.cpu().double(), x.double() @ values.T + bias.double(), rtol=1e-2, atol=2e-2)


def test_no_rows(gpu):
    weight, _ = weight_of(4, 64, 64)
    x = torch.empty((0, 64), device=gpu.device)
    assert linear_4bit_cuda.simt(x, to(gpu.device, weight), [4, 64], None).shape == (0, 4)
