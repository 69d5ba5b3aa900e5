"""A single row of activations in 16 bits: only where it was asked for, within its error bound."""

import math

import pytest
import torch

from pyqlora import _C
from pyqlora.functional import gemv_4bit, quantize_4bit, set_activation_precision
from pyqlora.nn import Linear4bit
from pyqlora.ops.lora_linear_4bit import lora_linear_4bit
from pyqlora.quant import dequantize_4bit

needs_avx2 = pytest.mark.skipif(_C.cpu.supported_isas() == ["scalar"], reason="no AVX2")


@pytest.fixture
def int16():
    assert set_activation_precision("int16") == "float32"
    yield
    assert set_activation_precision("float32") == "int16"


def bound(x, w, absmax, blocksize):
    """What rounding x (by halves of a step of each 64) and the codes' values (by 1/32768) can do to x · Wᵀ, [n]."""
    k = x.numel()
    padded = torch.nn.functional.pad(x.double().abs().flatten(), (0, -k % 64)).view(-1, 64)
    step = (padded.amax(1, keepdim=True) / 16383 / 2).expand(-1, 64).flatten()[:k]
    scale = absmax.double().view(len(w), -1).repeat_interleave(blocksize, 1)
    x, w = x.double().abs(), w.double().abs()
    rounding = torch.finfo(torch.float32).eps * (math.ceil(k / 64) + 8)
    return (w * step + scale / 32768 * (x + step) + rounding * scale * (x + step)).sum(1)


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024])
def test_error_is_within_the_bound(int16, blocksize, quant_type, dtype):
    for blocks in (1, 2, 3, 5):
        n, k = 9, blocks * blocksize
        for scale in (torch.ones(k), torch.logspace(-6, 3, k)):
            w, x, bias = torch.randn(n, k), (torch.randn(1, k) * scale).to(dtype), torch.randn(n)
            packed, state = quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
            decoded = dequantize_4bit(packed, state)
            y = torch.ops.pyqlora.linear_4bit(x, packed, *state.scales(), blocksize, quant_type, [n, k], bias).double()
            exact = x.double() @ decoded.double().T + bias.double()
            limit = bound(x[0], decoded, state.absmax, blocksize)
            limit += torch.finfo(torch.float32).eps * exact.abs()[0]
            if dtype != torch.float32:
                limit += torch.finfo(dtype).eps * exact.abs()[0] + torch.finfo(dtype).smallest_normal
            assert ((y - exact).abs()[0] <= limit).all()


@needs_avx2
def test_error_on_normal_data(int16):
    """The figure that the documentation gives, with room for the tail: 1e-4 of the largest output."""
    packed, state = quantize_4bit(torch.randn(512, 4096), quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, 4096)
    exact = x.double() @ dequantize_4bit(packed, state).double().T
    error = (gemv_4bit(x, packed.t(), state=state) - exact).abs().max() / exact.abs().max()
    assert 1e-6 < error < 2e-4


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_update_is_added_in_float32(int16, dtype):
    packed, state = quantize_4bit(torch.zeros(5, 64), quant_type="nf4")
    x, a, b = (torch.randn(shape).to(dtype) for shape in ((1, 64), (3, 64), (5, 3)))
    y = lora_linear_4bit(x, (packed, *state.scales(), state.blocksize, "nf4"), [5, 64], None, a, b, 0.5)
    torch.testing.assert_close(y, (0.5 * (x.float() @ a.float().T) @ b.float().T).to(dtype))


@needs_avx2
def test_an_update_does_not_change_the_rounding(int16):
    packed, state = quantize_4bit(torch.randn(9, 128), quant_type="nf4")
    x, weight = torch.randn(1, 128), (packed, *state.scales(), state.blocksize, "nf4")
    y = lora_linear_4bit(x, weight, [9, 128], None, torch.randn(2, 128), torch.zeros(9, 2), 1.0)
    assert torch.equal(y, gemv_4bit(x, packed.t(), state=state))


@needs_avx2
def test_extremes_of_x(int16):
    """The largest sums fit, zeros and the smallest numbers give zeros, what is not finite gives NaN."""
    w = torch.ones(3, 256)
    packed, state = quantize_4bit(w, quant_type="nf4")

    def product(x):
        return gemv_4bit(x, packed.t(), state=state)

    torch.testing.assert_close(product(torch.full((1, 256), -2.0)), torch.full((1, 3), -512.0), rtol=2e-4, atol=0)
    assert torch.equal(product(torch.zeros(1, 256)), torch.zeros(1, 3))
    assert torch.equal(product(torch.full((1, 256), 1e-45)), torch.zeros(1, 3))
    for bad in (math.inf, math.nan):
        x = torch.ones(1, 256)
        x[0, 70] = bad
        assert product(x).isnan().all()


@needs_avx2
def test_serves_one_row_on_whole_blocks_only(int16):
    def products(m, k):
        layer = Linear4bit(k, 8, quant_type="nf4").to("cpu")
        x = torch.randn(m, k)
        rounded = layer(x)
        set_activation_precision("float32")
        exact = layer(x)
        set_activation_precision("int16")
        return rounded, exact

    assert not torch.equal(*products(1, 128))
    assert torch.equal(*products(2, 128))
    assert torch.equal(*products(1, 96))


@needs_avx2
def test_is_off_by_default_and_repeats(int16):
    packed, state = quantize_4bit(torch.randn(64, 256))
    x = torch.randn(1, 256)
    first = gemv_4bit(x, packed.t(), state=state)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(gemv_4bit(x, packed.t(), state=state), first)
    torch.set_num_threads(before)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="set_activation_precision: expected 'float32' or 'int16', got 'int8'"):
        set_activation_precision("int8")
    _C.cpu.set_isa("scalar")
    try:
        with pytest.raises(RuntimeError, match="'int16' needs a processor with AVX2; keep 'float32'"):
            set_activation_precision("int16")
        packed, state = quantize_4bit(torch.randn(4, 64))

        def native(rows, shape=(4, 64)):
            x, y = torch.randn(rows, shape[1]), torch.empty(rows, shape[0])
            _C.cpu.linear_4bit_int16(x, packed, *state.scales(), None, y, *shape, state.blocksize, "nf4", 1)

        with pytest.raises(ValueError, match="linear_4bit_int16: x: expected one row, got 2"):
            native(2)
        with pytest.raises(ValueError, match="linear_4bit_int16: shape: expected K a multiple of the block size"):
            native(1, (8, 32))
        with pytest.raises(RuntimeError, match="linear_4bit_int16: the CPU kernels in use have no AVX2"):
            native(1)
    finally:
        _C.cpu.set_isa("")
