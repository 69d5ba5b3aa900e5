"""What only the CPU kernels of quantize have: instruction sets, windows cut anywhere, threads, large results."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops.quantize import (
    dequantize_4bit,
    dequantize_4bit_into,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097, 10007]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-39, 1.1e-38, 6e-8, 65504.0, 3e38]


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _C.cpu.set_isa("")


def same_bits(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    return torch.equal(a.view(integer), b.view(integer))


def inputs(n, dtype):
    x = torch.randn(n)
    yield x.to(dtype)
    x[torch.randint(n, (len(SPECIAL),))] = torch.tensor(SPECIAL)
    yield x.to(dtype)


def on_every_isa(f):
    results = []
    for isa in _C.cpu.supported_isas():
        _C.cpu.set_isa(isa)
        results.append(f())
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_instruction_sets_give_the_same_4bit_bytes(blocksize, quant_type, dtype):
    for n in SIZES:
        for x in inputs(n, dtype):

            def both(x=x, n=n):
                packed, absmax = quantize_4bit(x, blocksize, quant_type)
                out = dequantize_4bit(packed, absmax, None, None, None, 256, blocksize, quant_type, [n], dtype)
                return packed, absmax, out

            first, *others = on_every_isa(both)
            for other in others:
                assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_give_the_same_8bit_bytes(dtype):
    code = torch.linspace(-1, 1, 256)
    for n in [*SIZES, 40000]:
        for x in inputs(n, dtype):

            def both(x=x):
                q, absmax = quantize_blockwise(x, code, 256)
                return q, absmax, dequantize_blockwise(q, code, absmax, 256, dtype)

            first, *others = on_every_isa(both)
            for other in others:
                assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows(dtype, nested):
    n = 1001
    packed, absmax = quantize_4bit(torch.randn(n), 64, "nf4")
    scales = (absmax, None, None, None, 64)
    if nested:
        code = torch.linspace(-1, 1, 256)
        offset = absmax.mean().reshape(1)
        codes, nested_absmax = quantize_blockwise(absmax - offset, code, 64)
        scales = (codes, nested_absmax, code, offset, 64)
    for isa in _C.cpu.supported_isas():
        _C.cpu.set_isa(isa)
        whole = dequantize_4bit(packed, *scales, 64, "nf4", [n], dtype)
        for first in (0, 1, 31, 32, 33, 63, 64, 65, 500, 999, 1000):
            for size in (0, 1, 2, 31, 32, 33, 64, 129, 1000):
                size = min(size, n - first)
                out = torch.full((size + 2,), 7.0, dtype=dtype)
                dequantize_4bit_into(out[1:-1], packed, *scales, 64, "nf4", n, first)
                assert torch.equal(out[1:-1], whole[first : first + size])
                assert out[0] == 7 and out[-1] == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype):
    """Decoded into a view with gaps between its rows, on each instruction set, a result past the caches among them."""
    for rows, columns, stride in ((70, 100, 129), (5, 4096, 4160), (3000, 3008, 3072)):
        packed, absmax = quantize_4bit(torch.randn(rows * columns), 64, "nf4")
        arguments = (packed, absmax, None, None, None, 64, 64, "nf4")
        whole = dequantize_4bit(*arguments, [rows, columns], dtype)
        for isa in _C.cpu.supported_isas() if rows < 3000 else [""]:
            _C.cpu.set_isa(isa)
            buffer = torch.full((rows, stride), 7.0, dtype=dtype)
            dequantize_4bit_into(buffer[:, :columns], *arguments, rows * columns)
            assert torch.equal(buffer[:, :columns], whole) and (buffer[:, columns:] == 7).all()


def test_any_number_of_threads_gives_the_same_bytes():
    x = torch.randn(1 << 19)
    code = torch.linspace(-1, 1, 256)
    before = torch.get_num_threads()

    def everything():
        packed, absmax = quantize_4bit(x, 64, "nf4")
        out = dequantize_4bit(packed, absmax, None, None, None, 256, 64, "nf4", [x.numel()], torch.bfloat16)
        rows = torch.zeros(1 << 9, 1100)
        dequantize_4bit_into(rows[:, : 1 << 10], packed, absmax, None, None, None, 256, 64, "nf4", x.numel())
        return packed, absmax, out, rows, *quantize_blockwise(x, code, 256)

    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_share_no_memory_while_alive(dtype):
    n = 3000 * 3000
    packed, absmax = quantize_4bit(torch.randn(n), 64, "nf4")
    arguments = (packed, absmax, None, None, None, 256, 64, "nf4")
    expected = dequantize_4bit_into(torch.empty(n, dtype=dtype), *arguments, n)
    kept = None
    for _ in range(3):
        out = dequantize_4bit(*arguments, [3000, 3000], dtype)
        view = out[1500]
        del out  # the view holds the memory
        other = dequantize_4bit(*arguments, [n], dtype)
        assert torch.equal(view, expected[4500000:4503000]) and torch.equal(other, expected)
        assert kept is None or torch.equal(kept, expected[:3000])
        kept = other[:3000]
        kept.add_(0)  # writable
