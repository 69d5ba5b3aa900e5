"""The GPU kernels of lora_linear, called directly, against float64."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops import lora_linear_cuda as kernels
from pyqlora.ops.backend import native

DTYPES = (torch.float16, torch.bfloat16)
SEED = 0x1234_5678_9ABC


@pytest.fixture
def gpu(backend):
    if backend.name == "cpu":
        pytest.skip("kernels of the GPU")
    return backend


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def dropped(x, dropout):
    """x in float64 under the CPU's mask."""
    y = torch.empty(x.shape)
    _C.cpu.lora_dropout(x.float(), y, torch.tensor([SEED]), dropout, x.shape[-1], 1)
    return y.double()


def close(got, want, magnitude, terms, operand=0.0):
    """float32 sums of `terms` products of that total magnitude, factors off by `operand`, one rounding at the end."""
    unit = torch.finfo(got.dtype).eps / 2
    bound = magnitude * (operand + terms * 2**-24) + want.abs() * unit + torch.finfo(got.dtype).smallest_normal * unit
    error = (got.cpu().double() - want).abs()
    assert (error <= bound * 1.01 + 1e-30).all(), f"{(error / bound).max():.2f} of the bound"


def rounding(dtype, factor):
    """Relative error of a factor as an operand of the tensor cores."""
    return 0.0 if factor == dtype else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "m", "ranks", "k", "factor"),
    [
        (torch.float16, 1, [8], 64, torch.float16),
        (torch.bfloat16, 7, [1], 33, torch.float32),
        (torch.bfloat16, 32, [16], 512, torch.float32),
        (torch.float16, 33, [17], 31, torch.float32),
        (torch.bfloat16, 65, [64], 96, torch.bfloat16),
        (torch.float16, 3, [8, 16, 5], 136, torch.bfloat16),
        (torch.bfloat16, 5, [40, 41], 40, torch.float16),
        (torch.bfloat16, 2, [16], 1, torch.float32),
    ],
)
def test_down(gpu, dtype, m, ranks, k, factor, dropout):
    x, a = rand(m, k, dtype=dtype), [rand(r, k, dtype=factor, seed=i) for i, r in enumerate(ranks)]
    scales = [0.5 * 2.0**i for i in range(len(ranks))]
    seed = torch.tensor([SEED], device=gpu.device) if dropout else None
    s = kernels.down(x.to(gpu.device), [f.to(gpu.device) for f in a], scales, seed, dropout)
    rows = dropped(x, dropout) if dropout else x.double()
    for got, scale, f in zip(s, scales, a, strict=True):
        want, size = scale * (rows @ f.double().T), scale * (rows.abs() @ f.double().abs().T)
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        close(got, want, size, k, rounding(dtype, factor))


def test_down_is_split_and_repeats(gpu):
    x, a = rand(20, 4160, dtype=torch.bfloat16).to(gpu.device), rand(8, 4160).to(gpu.device)
    module = native(x)[0]
    assert module.lora_down_splits(1, 4160, 4) > 1
    (first,), (second,) = (kernels.down(x, [a], [1.0]) for _ in range(2))
    assert torch.equal(first, second)
    want = x.cpu().double() @ a.cpu().double().T
    close(first, want, x.cpu().double().abs() @ a.cpu().double().abs().T, 4160, 2**-8)


def test_a_factor_gives_the_same_bits_alone_and_stacked(gpu):
    """For any rank, and split sums too."""
    for m, k in ((20, 4160), (70, 72)):
        x = rand(m, k, dtype=torch.bfloat16).to(gpu.device)
        a = [rand(rank, k, seed=rank).to(gpu.device) for rank in (16, 5, 64, 1)]
        scales = [1.0, 2.0, 0.5, 3.0]
        for stacked, factor, scale in zip(kernels.down(x, a, scales), a, scales, strict=True):
            assert torch.equal(stacked, kernels.down(x, [factor], [scale])[0])


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "m", "rank", "n", "factor"),
    [
        (torch.float16, 1, 8, 64, torch.float16),
        (torch.bfloat16, 33, 16, 264, torch.float32),
        (torch.float16, 5, 17, 33, torch.float32),
        (torch.bfloat16, 65, 64, 7, torch.bfloat16),
        (torch.bfloat16, 2, 1, 1, torch.float16),
    ],
)
def test_up(gpu, dtype, m, rank, n, factor, dropout, accumulate):
    s, b, y = rand(m, rank, dtype=dtype), rand(n, rank, dtype=factor), rand(m, n, dtype=dtype, seed=1)
    seed = torch.tensor([SEED], device=gpu.device) if dropout else None
    got = kernels.up(s.to(gpu.device), [b.to(gpu.device)], y.clone().to(gpu.device), seed, dropout, accumulate)
    keep = (dropped(torch.ones(m, n), dropout) if dropout else torch.ones(m, n)).double()
    want = keep * (s.double() @ b.double().T) + accumulate * y.double()
    size = s.double().abs() @ b.double().abs().T + y.double().abs()
    close(got, want, size, rank + 2, rounding(dtype, factor))


@pytest.mark.parametrize(
    ("dtype", "m", "rank", "n", "factor"),
    [
        (torch.float16, 1, 8, 64, torch.float16),
        (torch.bfloat16, 16, 16, 520, torch.float32),
        (torch.float16, 17, 17, 33, torch.float32),
        (torch.bfloat16, 65, 64, 72, torch.bfloat16),
        (torch.bfloat16, 150, 5, 1031, torch.float32),
        (torch.bfloat16, 3, 1, 1, torch.float16),
    ],
)
def test_backward(gpu, dtype, m, rank, n, factor):
    dy, b, s = rand(m, n, dtype=dtype), rand(n, rank, dtype=factor), rand(m, rank, dtype=dtype)
    ds, db = kernels.backward(dy.to(gpu.device), b.to(gpu.device), s.to(gpu.device), 0.5)
    assert ds.dtype == dtype and db.dtype == factor
    dyd, bd, sd = dy.double(), b.double(), s.double()
    close(ds, 0.5 * (dyd @ bd), 0.5 * (dyd.abs() @ bd.abs()), n, rounding(dtype, factor))
    close(db, dyd.T @ sd, dyd.abs().T @ sd.abs(), m)
    again = kernels.backward(dy.to(gpu.device), b.to(gpu.device), s.to(gpu.device), 0.5)
    assert torch.equal(again[0], ds) and torch.equal(again[1], db)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("m", "rank", "k"), [(1, 1, 1), (33, 16, 72), (130, 33, 525)])
def test_backward_a(gpu, m, rank, k, dropout):
    x, ds, a = rand(m, k, dtype=torch.bfloat16), rand(m, rank, dtype=torch.bfloat16), rand(rank, k)
    seed = torch.tensor([SEED], device=gpu.device) if dropout else None
    da = kernels.backward_a(x.to(gpu.device), a.to(gpu.device), ds.to(gpu.device), seed, dropout)
    rows = dropped(x, dropout) if dropout else x.double()
    close(da, ds.double().T @ rows, ds.double().abs().T @ rows.abs(), m)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize(("m", "columns"), [(1, 1), (3, 7), (5, 64), (2, 1031)])
def test_dropout_is_the_same_everywhere(backend, dtype, m, columns):
    x = rand(m, columns, dtype=dtype)
    for out in {torch.float32, dtype}:
        y = torch.empty_like(x, dtype=out).to(backend.device)
        seed = torch.tensor([SEED], device=backend.device)
        module, context = native(y)
        module.lora_dropout(x.to(backend.device), y, seed, 0.25, columns, context)
        assert torch.equal(y.cpu().double(), dropped(x, 0.25))


def test_philox_is_the_published_one():
    """Known answer of Philox4x32-10 (Random123, kat_vectors): all zeros, key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for threshold in halves:
        y = torch.empty(1, 8)
        _C.cpu.lora_dropout(torch.ones(1, 8), y, torch.tensor([0]), threshold / 65536, 8, 1)
        assert y.flatten().tolist() == [float(half >= threshold) for half in halves]


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (5, torch.bfloat16), (40, torch.bfloat16)])
def test_adapters_by_row(gpu, rows, dtype):
    names, ranks, k, n = (0, 2, 2, -1, 1, 0), [8, 3, 17], 72, 88
    x, y = rand(len(names) * rows, k, dtype=dtype), rand(len(names) * rows, n, dtype=dtype)
    a, b = [rand(r, k, seed=r) for r in ranks], [rand(n, r, seed=r) for r in ranks]
    tiles = kernels.tiles_of(names, rows, gpu.device)
    s = kernels.down_rows(x.to(gpu.device), [f.to(gpu.device) for f in a], [0.5, 1.0, 2.0], tiles)
    got = kernels.up(s, [f.to(gpu.device) for f in b], y.clone().to(gpu.device), tiles=tiles)
    for sample, name in enumerate(names):
        at = slice(sample * rows, (sample + 1) * rows)
        if name < 0:
            assert torch.equal(got[at].cpu(), y[at]) and not s[at].any()
            continue
        want = x[at].double() @ a[name].double().T * (0.5, 1.0, 2.0)[name]
        size = x[at].double().abs() @ a[name].double().abs().T * 2
        assert not s[at, ranks[name] :].any()
        close(s[at, : ranks[name]], want, size, k, rounding(dtype, torch.float32))
        sd = s[at, : ranks[name]].cpu().double()
        want = sd @ b[name].double().T + y[at].double()
        size = sd.abs() @ b[name].double().abs().T + y[at].double().abs()
        close(got[at], want, size, 20, rounding(dtype, torch.float32))
