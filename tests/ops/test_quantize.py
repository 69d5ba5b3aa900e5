"""4-bit and 8-bit block quantization: every backend against the reference and against bitsandbytes, bit for bit."""

from __future__ import annotations

import pytest
import reference
import torch

from pyqlora.ops import quantize as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZES_8BIT = BLOCKSIZES_4BIT[1:]


def weights(n, dtype, seed=0):
    """Normal values with the cases that formats trip over: zero blocks, denormals, midpoints, both signs of one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    x[3::97] = 1e-41
    x[5::31] = -0.0
    x[128:192] = 0.0
    x[192:256] *= 1e-30
    if n > 300:
        table = reference.table("nf4")
        x[256:271], x[271] = (table[1:] + table[:-1]) / 2, 1.0
    return x.to(dtype)


def dynamic_map():
    """A map like the optimizers': signed, denser towards zero, not symmetric."""
    x = torch.linspace(-1, 1, 257)[1:] ** 3
    return x.sort().values


def run_4bit(backend, x, blocksize, quant_type):
    packed, absmax = ops.quantize_4bit(x.to(backend.device), blocksize, quant_type)
    return packed.cpu(), absmax.cpu()


def decode_4bit(backend, packed, absmax, blocksize, quant_type, shape, dtype, nested=(None, None, None), nested_bs=256):
    tensors = [None if t is None else t.to(backend.device) for t in (packed, absmax, *nested)]
    return ops.dequantize_4bit(*tensors, nested_bs, blocksize, quant_type, shape, dtype).cpu()


def equal(a, b):
    """Same dtype, shape and bits, any NaN being as good as another."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and a.nan_to_num().equal(b.nan_to_num())
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)
def test_4bit_equals_reference(backend, blocksize, dtype, quant_type):
    for n in (1, 2, blocksize - 1, blocksize, blocksize + 1, 4096 + 7, 8191):
        x = weights(n, dtype)
        packed, absmax = run_4bit(backend, x, blocksize, quant_type)
        expected_packed, expected_absmax = reference.quantize_4bit(x, blocksize, quant_type)
        assert packed.equal(expected_packed) and absmax.equal(expected_absmax), n
        decoded = decode_4bit(backend, packed, absmax, blocksize, quant_type, [n], dtype)
        assert equal(decoded, reference.dequantize_4bit(packed, absmax, blocksize, quant_type, [n], dtype)), n
