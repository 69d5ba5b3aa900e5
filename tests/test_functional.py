import inspect

import peers
import pytest
import torch

from pyqlora import functional as F
from pyqlora import matmul_4bit


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


OWN = {"set_activation_precision"}
FUNCTIONS = [name for name in F.__all__ if inspect.isfunction(getattr(F, name)) and name not in OWN]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_bitsandbytes(name):
    peer = pytest.importorskip("bitsandbytes.functional")
    ours = inspect.signature(getattr(F, name)).parameters.values()
    theirs = inspect.signature(getattr(peer, name)).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_matmul_4bit_arguments_are_bitsandbytes():
    peer = pytest.importorskip("bitsandbytes")
    assert list(inspect.signature(matmul_4bit).parameters) == list(inspect.signature(peer.matmul_4bit).parameters)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("create_dynamic_map", {}),
        ("create_dynamic_map", {"signed": False}),
        ("create_dynamic_map", {"total_bits": 5, "max_exponent_bits": 3}),
        ("create_linear_map", {}),
        ("create_linear_map", {"signed": False, "total_bits": 4}),
        ("create_linear_map", {"add_zero": False}),
        ("create_fp8_map", {}),
        ("create_fp8_map", {"exponent_bits": 2, "precision_bits": 1, "total_bits": 4}),
        ("create_fp8_map", {"signed": False, "exponent_bits": 4, "precision_bits": 4}),
        ("create_normal_map", {}),
        ("create_normal_map", {"use_extra_value": False}),
        ("get_4bit_type", {"typename": "nf4", "device": "cpu"}),
        ("get_4bit_type", {"typename": "fp4", "device": "cpu"}),
        ("get_4bit_type", {"typename": "af4", "device": "cpu"}),
    ],
)
def test_tables_equal_bitsandbytes(name, arguments):
    peer = pytest.importorskip("bitsandbytes.functional")
    if name == "create_normal_map":
        pytest.importorskip("scipy")
    assert torch.equal(getattr(F, name)(**arguments), getattr(peer, name)(**arguments))


def test_table_errors():
    with pytest.raises(NotImplementedError, match="nf3"):
        F.get_4bit_type("nf3")
    with pytest.raises(NotImplementedError, match="af4 with blocksize 128"):
        F.get_4bit_type("af4", blocksize=128)
    with pytest.raises(ValueError, match=r"must add up to total_bits = 8, got 1 \+ 5 \+ 3"):
        F.create_fp8_map(precision_bits=3)
    with pytest.raises(ValueError, match="total_bits=8 needs 256"):
        F.create_dynamic_map(signed=False, max_exponent_bits=5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_forms_of_quantize_4bit(quant_type):
    x = random(12, 64)
    packed, state = F.quantize_4bit(x, quant_type=quant_type)
    named, named_state = getattr(F, f"quantize_{quant_type}")(x)
    assert torch.equal(packed, named) and state == named_state
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    given, given_state = F.quantize_4bit(x, absmax, out, quant_type=quant_type)
    assert given is out and given_state.absmax is absmax and torch.equal(out, packed)

    y = F.dequantize_4bit(packed, state)
    assert torch.equal(getattr(F, f"dequantize_{quant_type}")(packed, state), y)
    out = torch.empty_like(x)
    assert F.dequantize_4bit(packed, absmax=absmax, out=out, quant_type=quant_type) is out and torch.equal(out, y)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), y.t())


def test_dequantize_4bit_into_rows_of_a_larger_tensor():
    x = random(12, 64)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    buffer = torch.zeros(12, 80)
    out = buffer[:, :64]
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, F.dequantize_4bit(packed, state)) and not buffer[:, 64:].any()
    with pytest.raises(ValueError, match="dequantize_4bit: out: expected a contiguous tensor, or rows of one"):
        F.dequantize_4bit(packed, state, out=torch.zeros(64, 12).t())
    with pytest.raises(ValueError, match=r"out must have shape \(12, 64\), got \(12, 80\)"):
        F.dequantize_4bit(packed, state, out=buffer)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_blockwise_equals_bitsandbytes(blocksize, dtype, nested):
    peer = pytest.importorskip("bitsandbytes.functional")
    x = random(3, 1001, dtype=dtype)
    q, state = F.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    expected, expected_state = peer.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    assert torch.equal(q, expected) and torch.equal(state.absmax, expected_state.absmax)
    decoded, theirs = F.dequantize_blockwise(q, state), peer.dequantize_blockwise(expected, expected_state)
    state.dtype = torch.float32
    assert peers.decoded_alike(decoded, theirs, F.dequantize_blockwise(q, state))


def test_forms_of_blockwise():
    x, code = random(5, 100), F.create_linear_map()
    q, state = F.quantize_blockwise(x, code, blocksize=64)
    out, absmax = torch.empty_like(q), torch.empty_like(state.absmax)
    given, given_state = F.quantize_blockwise(x, code, absmax, out, blocksize=64)
    assert given is out and given_state.absmax is absmax and torch.equal(out, q)
    y = F.dequantize_blockwise(q, state)
    out = torch.empty_like(x)
    assert F.dequantize_blockwise(q, absmax=absmax, code=code, out=out, blocksize=64) is out and torch.equal(out, y)
    assert (y - x).abs().max() <= state.absmax.max() / 254 * 1.01


def test_missing_arguments():
    packed, state = F.quantize_4bit(random(2, 64))
    with pytest.raises(ValueError, match="requires both absmax and out"):
        F.dequantize_4bit(packed)
    with pytest.raises(ValueError, match="requires either quant_state or absmax"):
        F.dequantize_blockwise(packed)
    with pytest.raises(ValueError, match="requires the state"):
        F.gemv_4bit(random(1, 64), packed)
    with pytest.raises(ValueError, match="quant_state is required"):
        matmul_4bit(random(1, 64), packed, None)
    _, state = F.quantize_4bit(random(64))
    with pytest.raises(ValueError, match=r"must be 2D \[N, K\], got \(64,\)"):
        matmul_4bit(random(1, 64), packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 5, 64)])
def test_products_agree_with_the_dequantized_weight(shape, nested, dtype):
    """To the error that a product of this dtype has anyway, against float64."""
    x, w = random(*shape, dtype=dtype), random(48, 64, dtype=dtype, seed=1)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    bias = random(48, dtype=dtype, seed=2)
    state.dtype = torch.float32  # the kernels decode in float32
    dense = F.dequantize_4bit(packed, state).double()
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    allowed = torch.finfo(dtype).eps * expected.abs() + 64 * torch.finfo(torch.float32).eps * size
    if dtype != torch.float32:
        allowed += torch.finfo(dtype).eps * size  # backends may multiply in the dtype itself
    for packed_form in (packed, packed.t()):
        assert ((F.gemv_4bit(x, packed_form, state=state) - expected).abs() <= allowed).all()
        assert ((matmul_4bit(x, packed_form, state) - expected).abs() <= allowed).all()
    with_bias = matmul_4bit(x, packed, state, bias=bias) - bias.double()
    assert ((with_bias - expected).abs() <= allowed + 2 * torch.finfo(dtype).eps * (expected + bias).abs()).all()
    out = torch.empty(*shape[:-1], 48, dtype=dtype)
    assert matmul_4bit(x, packed, state, out) is out and torch.equal(out, matmul_4bit(x, packed, state))


def test_matmul_4bit_gradient():
    x = random(5, 64).requires_grad_()
    bias = random(48).requires_grad_()
    packed, state = F.quantize_4bit(random(48, 64, seed=1), quant_type="nf4", compress_statistics=True)
    dy = random(5, 48, seed=2)
    matmul_4bit(x, packed, state, bias=bias).backward(dy)
    expected = dy.double() @ F.dequantize_4bit(packed, state).double()
    assert torch.allclose(x.grad.double(), expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps * 8)
    assert torch.allclose(bias.grad, dy.sum(0))


def test_paged_tensors_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PYQLORA_PAGE_DIR", str(tmp_path))
    x = F.get_paged(30, 1000, dtype=torch.float32, device="cpu")
    assert x.shape == (30, 1000) and not x.any() and x.is_paged and x.page_deviceid is None
    x.copy_(expected := torch.randn(30, 1000))
    F.prefetch_tensor(x, to_cpu=True)
    F.prefetch_tensor(x)
    assert torch.equal(x, expected)
    with pytest.raises(ValueError, match="prefetch_tensor: expected a tensor of get_paged, got one that is not paged"):
        F.prefetch_tensor(expected)
