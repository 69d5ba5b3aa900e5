"""lora_rows against float64 on every backend, ranks and batches mixed."""

from __future__ import annotations

import pytest
import torch

from pyqlora.ops.lora_rows import lora_rows

RANKS = (8, 1, 17)


def problem(samples, rows, k=40, n=24, dtype=torch.float32, ranks=RANKS):
    g = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, *rows, k, generator=g).to(dtype)
    base = torch.randn(samples, *rows, n, generator=g).to(dtype)
    a = [torch.randn(r, k, generator=g) for r in ranks]
    b = [torch.randn(n, r, generator=g) for r in ranks]
    return base, x, a, b, [0.5 * (i + 1) for i in range(len(ranks))]


def reference(base, x, a, b, scalings, adapters):
    """(y, sums of magnitudes)"""
    y, size = base.double().clone(), base.double().abs()
    for i, adapter in enumerate(adapters):
        if adapter >= 0:
            down, up, scale = a[adapter].double(), b[adapter].double(), scalings[adapter]
            y[i] += scale * (x[i].double() @ down.T) @ up.T
            size[i] += scale * (x[i].double().abs() @ down.abs().T) @ up.abs().T
    return y, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("adapters", "rows"),
    [([0], (1,)), ([0, 2, 1, -1], (1,)), ([-1, -1], (3,)), ([2, 2, 0, 1, 1], (2, 17)), ([1], (70,))],
)
def test_equals_float64(backend, dtype, adapters, rows):
    base, x, a, b, scalings = problem(len(adapters), rows, dtype=dtype)
    move = [t.to(backend.device) for t in (base, x)], [[t.to(backend.device) for t in ts] for ts in (a, b)]
    y = lora_rows(*move[0], *move[1], scalings, adapters).cpu()
    want, size = reference(base, x, a, b, scalings, adapters)
    assert y.dtype == dtype and y.shape == base.shape
    # A, B and the rounded x·Aᵀ as operands of that precision, then the result's own rounding.
    unit = torch.finfo(dtype).eps / 2
    assert ((y.double() - want).abs() <= 4 * unit * size + 100 * 2**-24 * size + 1e-6).all()


def test_more_adapters_than_one_launch_takes(backend):
    base, x, a, b, scalings = problem(70, (1,), dtype=torch.float16, ranks=(1, 3) * 35)
    adapters = list(range(69, -1, -1))
    move = [t.to(backend.device) for t in (base, x)], [[t.to(backend.device) for t in ts] for ts in (a, b)]
    y = lora_rows(*move[0], *move[1], [s / 35 for s in scalings], adapters).cpu()
    want, size = reference(base, x, a, b, [s / 35 for s in scalings], adapters)
    assert ((y.double() - want).abs() <= 2**-9 * size + 1e-6).all()


def test_gradients():
    base, x, a, b, scalings = problem(3, (2,))
    tensors = [t.double().requires_grad_() for t in (base, x, *a, *b)]

    def f(base, x, *factors):
        return lora_rows(base, x, list(factors[:3]), list(factors[3:]), scalings, [2, -1, 0])

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)


def test_operator_contract():
    base, x, a, b, scalings = problem(3, (2,))
    torch.library.opcheck(torch.ops.pyqlora.lora_rows, (base, x, a, b, scalings, [2, -1, 0]))


def test_compiles_whole():
    base, x, a, b, scalings = problem(3, (2,))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(base, x):
        return lora_rows(base, x, a, b, scalings, [0, 1, -1]) * 2

    torch.testing.assert_close(f(base, x), 2 * lora_rows(base, x, a, b, scalings, [0, 1, -1]))


def test_errors():
    base, x, a, b, scalings = problem(2, (1,))
    with pytest.raises(
        ValueError, match="lora_rows: expected as many a as b and scalings, at least one, got 3, 2 and 3"
    ):
        lora_rows(base, x, a, b[:2], scalings, [0, 0])
    with pytest.raises(ValueError, match=r"lora_rows: adapters: expected 2 numbers from -1 to 2, got \[0, 3\]"):
        lora_rows(base, x, a, b, scalings, [0, 3])
    with pytest.raises(ValueError, match=r"got base \[2, 1, 24\], x \[2, 1, 39\], a \[8, 40\], b \[24, 8\]"):
        lora_rows(base, x[..., 1:], a, b, scalings, [0, 0])
