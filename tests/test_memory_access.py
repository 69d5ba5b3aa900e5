"""How the kernels' accesses fall on shared memory's banks and device memory's sectors, counted by the emulation.

1 is what the same bytes take at least, once for each request of a warp. The limits are what each kernel needs more, for
the reason given; a store's width is a lane's.
"""

import emulation
import pytest
import torch

from pyqlora.ops import backend, linear_4bit_cuda, lora_linear_cuda, quantize
from pyqlora.ops.optim_step import RULES, optim_step
from pyqlora.optim.states import encode, state_specs
from pyqlora.quant_maps import create_dynamic_map

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


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_4bit(quant_type):
    x = torch.randn(N, K, dtype=torch.bfloat16)
    totals = counted(lambda: quantize.quantize_4bit(x, 64, quant_type))
    for space in ("shared", "device"):
        for kind in ("load", "store"):  # bounds are looked up where the values fall, but are fewer than banks
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


@pytest.mark.parametrize(("columns", "stride", "first"), [(K, K + 16, 0), (K - 4, K + 5, 3)])
def test_dequantize_4bit_into_rows(columns, stride, first):
    """Stores of 16 bytes also where rows begin anywhere, but at their ends."""
    inputs, out = weight(False), torch.empty(N, stride, dtype=torch.bfloat16)[:, :columns]
    totals = counted(lambda: quantize.dequantize_4bit_into(out, *inputs, 64, "nf4", N * K, first))
    assert store_width(totals) == 16 and ratio(totals, "device", "store", 16) < (CLOSE if first == 0 else 1.1)
    assert ratio(totals, "shared", "load") < CLOSE
    # By bytes, four times the same sectors, where codes begin inside of a word.
    assert ratio(totals, "device", "load") < (CLOSE if first == 0 else 4.5)


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


def optimizer_batch(rule, bits, dtype):
    """One tensor whose states are in use, so that their codes fall where they do in training."""
    p, g, state = torch.randn(4096).to(dtype), torch.randn(4096).to(dtype), {"step": 3}
    for key, (shape, _) in state_specs(rule, p, 32).items():
        state[key] = torch.randn(shape) if key == "state1" else torch.rand(shape)
        if bits == 8:
            state["qmap" + key[-1]] = create_dynamic_map(key == "state1")
            state[key], state["absmax" + key[-1]] = encode(state[key], state["qmap" + key[-1]])
    if rule == "lamb" and bits == 32:
        state["unorm_vec"] = torch.zeros(1)
    return [p], [g], [state]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_optim_step(rule, bits, dtype):
    batch = optimizer_batch(rule, bits, dtype)
    limit = 1.0 if rule == "lamb" and bits == 32 else 0.0
    options = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8, "weight_decay": 0.1}
    totals = counted(lambda: optim_step(RULES[rule].name, *batch, lr=1e-2, max_unorm=limit, **options))
    # A lane's eight floats are two requests of 16 bytes for the same sectors; 16-bit and 8-bit ones are one.
    for kind in ("load", "store"):
        assert ratio(totals, "device", kind, 16) < (CLOSE if (bits, dtype) == (8, torch.bfloat16) else 2.01)
        assert ratio(totals, "device", kind, 8) < CLOSE
    assert store_width(totals) >= (8 if bits == 8 else 16)
    if bits == 8:
        # The map's values and midpoints are looked up wherever 32 codes fall among 256 words.
        assert ratio(totals, "shared", "load") < 4.5 and ratio(totals, "shared", "store") < CLOSE
        assert ratio(totals, "device", "load", 4) < 1.2  # scales; the maps' neighbours, shifted by a word


def factor_ratio(dtype):
    """Of 16-byte loads: a lane's eight float32 are two requests for the same sectors, 16-bit ones are one."""
    return 2.01 if dtype == torch.float32 else CLOSE


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adapters", [1, 3])
def test_lora_down_and_up(adapters, dtype, rank):
    """Also in batches whose rows use different adapters."""
    x, y = torch.randn(66, K, dtype=torch.bfloat16), torch.randn(66, K, dtype=torch.bfloat16)
    a = [torch.randn(rank, K).to(dtype) for _ in range(adapters)]
    b = [torch.randn(K, rank).to(dtype) for _ in range(adapters)]
    tiles = lora_linear_cuda.tiles_of((0, 2, 1), 22, x.device) if adapters > 1 else None
    s = []
    scales = [1.0] * adapters
    if tiles is None:
        totals = counted(lambda: s.extend(lora_linear_cuda.down(x, a, scales)))
    else:
        totals = counted(lambda: s.append(lora_linear_cuda.down_rows(x, a, scales, tiles)))
    assert ratio(totals, "device", "load", 16) < factor_ratio(dtype)
    assert max(ratio(totals, "shared", "load"), ratio(totals, "shared", "store")) < CLOSE
    assert ratio(totals, "device", "store") < 2.01  # sums: a fragment's neighbours are two apart, in two requests
    totals = counted(lambda: lora_linear_cuda.up(s[0], b, y, tiles=tiles))
    assert ratio(totals, "device", "load", 16) < factor_ratio(dtype)
    assert ratio(totals, "device", "store") < CLOSE and store_width(totals) == 16


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lora_backward(dtype, rank):
    dy, s = torch.randn(64, K, dtype=torch.bfloat16), torch.randn(64, rank, dtype=torch.bfloat16)
    b, a = torch.randn(K, rank).to(dtype), torch.randn(rank, K).to(dtype)
    for run in (
        lambda: lora_linear_cuda.backward(dy, b, s, 1.0),
        lambda: lora_linear_cuda.backward_a(dy, a, s, None, 0.0),
    ):
        totals = counted(run)
        assert ratio(totals, "device", "load", 16) < CLOSE  # dy, twice: once from memory
        assert max(ratio(totals, "shared", "load"), ratio(totals, "shared", "store")) < CLOSE
        # The sums' parts, and dB, eight ranks of a lane: eight floats are two requests for the same sectors.
        assert ratio(totals, "device", "store", 16) < 2.01 and store_width(totals) == 16
        # s and B by elements, eight of a rank's row side by side, which is half a sector; both stay in the caches.
        assert max(ratio(totals, "device", "load", width) for width in (2, 4)) < 2.01
        # What is left: dS or dA by elements, side by side; dS's parts, two of a lane.
        assert ratio(totals, "device", "store", 2) < CLOSE and ratio(totals, "device", "store", 4) < 2.01
