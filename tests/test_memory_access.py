"""How the kernels' accesses fall on shared memory's banks and device memory's sectors, counted by the emulation.

1 is what the same bytes take at least, once for each request of a warp. The limits are what each kernel needs more, for
the reason given; a store's width is a lane's.
"""

import emulation
import pytest
import torch

from pyqlora.ops import backend, linear_4bit_cuda, quantize

N, K = 64, 1024
CODE = torch.linspace(-1, 1, 256)
CLOSE = 1.01


def counted(run):
    """Of each instruction in each block: (space, load or store, bytes of a lane, requests, taken, ideal)."""
    device = emulation.device("checked")
    with backend.override(device), emulation.fresh_outputs():
        device.module.start_counting()
        run()
        totals = device.module.stop_counting()
    assert totals
    return totals


def ratio(totals, space, kind, width=None):
    """Taken over ideal, of all requests or those of one width."""
    chosen = [t for t in totals if t[:2] == (space, kind) and width in (None, t[2])]
    return sum(t[4] for t in chosen) / sum(t[5] for t in chosen) if chosen else 0.0


def store_width(totals):
    """Bytes of a lane in most of the bytes that go to device memory."""
    moved = {}
    for space, kind, width, requests, *_ in totals:
        if (space, kind) == ("device", "store"):
            moved[width] = moved.get(width, 0) + width * requests
    return max(moved, key=moved.get)


def weight(nested):
    packed, absmax = quantize.quantize_4bit(torch.randn(N, K), 64, "nf4")
    if not nested:
        return packed, absmax, None, None, None, 256
    q, nested_absmax = quantize.quantize_blockwise(absmax, CODE, 256)
    return packed, q, nested_absmax, CODE, torch.zeros(1), 256


def test_quantize_4bit():
    x = torch.randn(N, K, dtype=torch.bfloat16)
    totals = counted(lambda: quantize.quantize_4bit(x, 64, "nf4"))
    for space in ("shared", "device"):
        for kind in ("load", "store"):
            assert ratio(totals, space, kind) < CLOSE
    assert store_width(totals) == 4  # of the eight codes


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_4bit(nested):
    inputs = weight(nested)
    totals = counted(lambda: quantize.dequantize_4bit(*inputs, 64, "nf4", [N, K], torch.bfloat16))
    assert max(ratio(totals, "shared", "load"), ratio(totals, "shared", "store")) < CLOSE
    assert ratio(totals, "device", "store") < CLOSE and store_width(totals) == 16
    # A warp's 256 weights have four scales; nested, those are values of a map, looked up where they fall.
    assert ratio(totals, "device", "load") < (1.6 if nested else CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blockwise(dtype):
    x = torch.randn(N, K, dtype=dtype)
    # A lane's eight floats are two requests of 16 bytes, 32 apart, for the same sectors.
    vectors = 2.01 if dtype == torch.float32 else CLOSE
    totals = counted(lambda: quantize.quantize_blockwise(x, CODE, 256))
    assert ratio(totals, "device", "load", 16) < vectors and ratio(totals, "device", "store") < CLOSE
    assert store_width(totals) == 8
    # The search and the map are looked up wherever 32 values fall among 256 words: a few of them in one bank.
    assert ratio(totals, "shared", "load") < 4.5
    q, absmax = quantize.quantize_blockwise(x, CODE, 256)
    totals = counted(lambda: quantize.dequantize_blockwise(q, CODE, absmax, 256, dtype))
    assert ratio(totals, "device", "store") < vectors and store_width(totals) == 16
    assert ratio(totals, "shared", "load") < 4.5


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_simt(m, nested):
    x, w = torch.randn(m, K, dtype=torch.bfloat16), (*weight(nested), 64, "nf4")
    totals = counted(lambda: linear_4bit_cuda.simt(x, w, [N, K], None))
    assert ratio(totals, "shared", "load") < CLOSE and ratio(totals, "device", "load", 16) < CLOSE
    assert ratio(totals, "device", "load", 4) < (1.6 if nested else CLOSE)  # packed weights, and scales as above


@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_mma(m, nested):
    x, w = torch.randn(m, K, dtype=torch.bfloat16), (*weight(nested), 64, "nf4")
    totals = counted(lambda: linear_4bit_cuda.mma(x, w, [N, K], None))
    assert ratio(totals, "device", "load", 8) < CLOSE  # the packed weights: whole sectors of eight rows
    assert ratio(totals, "device", "load", 16) < 2.01  # x: a lane's 32 bytes are two requests for the same sectors
    assert ratio(totals, "shared", "store") < CLOSE
    assert ratio(totals, "shared", "load") < 1.8  # the pair table has none; the last sum over the warps has some
    assert ratio(totals, "device", "store") < (CLOSE if m < 32 else 2.01)  # with splits, float32 sums, likewise
    assert store_width(totals) == 16
