"""lora_linear against float64, with tolerances from the precision of the dtypes."""

from __future__ import annotations

import pytest
import torch

from pyqlora.ops.lora_linear import compute_dtype, dropped, lora_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [((1,), 1, 1, 1), ((3, 5), 7, 2, 11), ((17,), 64, 8, 33), ((2, 3, 4), 31, 16, 13)]


def make(rows, k, r, n, dtype=torch.float32, weight_dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(*rows, n, generator=g).to(dtype)
    x = torch.randn(*rows, k, generator=g).to(dtype)
    a = torch.randn(r, k, generator=g).to(weight_dtype)
    b = torch.randn(n, r, generator=g).to(weight_dtype)
    return [t.requires_grad_() for t in (base, x, a, b)]


def reference(base, x, a, b, scaling, mask=None):
    """y and its gradients for dy = cos(y) in float64, and the sums of magnitudes that bound rounding."""
    base, x, a, b = (t.detach().double().requires_grad_() for t in (base, x, a, b))
    dropped = x if mask is None else x * mask
    y = base + scaling * (dropped @ a.T) @ b.T
    y.backward(torch.cos(y.detach()))
    return y.detach(), [t.grad for t in (base, x, a, b)]


def close(got, want, dtype, terms):
    """Equal up to one rounding to `dtype` and fp32 rounding of a sum of that many terms of the tensor's size."""
    size = want.abs().max().item() + 1
    bound = torch.finfo(dtype).eps * want.abs() + 2e-7 * terms * size
    assert ((got.double() - want).abs() <= bound).all(), (got.double() - want).abs().max()


@pytest.mark.parametrize("rows, k, r, n", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_float64(rows, k, r, n, dtype, weight_dtype, inplace):
    base, x, a, b = make(rows, k, r, n, dtype, weight_dtype)
    want, grads = reference(base, x, a, b, 0.7)
    y = lora_linear(base * 1 if inplace else base, x, a, b, 0.7, inplace=inplace)
    assert y.dtype == dtype and y.shape == (*rows, n)
    close(y, want, dtype, k + r)
    y.backward(torch.cos(want).to(dtype))
    # dy itself was rounded to dtype: its relative error goes through the sums unchanged.
    slack = torch.finfo(dtype).eps * 4 * (n + r)
    for tensor, grad in zip((base, x, a, b), grads, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        scale = grad.abs().max() + 1
        assert (tensor.grad.double() - grad).abs().max() <= scale * (slack + torch.finfo(tensor.dtype).eps * 4)


def test_keeps_only_x_and_the_factors():
    base, x, a, b = make((64,), 128, 4, 96)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(base, x, a, b, 1.0, dropout=0.5)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == sorted([x.numel(), a.numel(), b.numel(), 64 * 4, 1])
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def mask(seed, shape, dropout):
    return dropped(torch.ones(shape), seed, dropout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dropout_mask_follows_from_the_seed(dtype):
    base, x, a, b = make((50,), 37, 4, 30, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    torch.manual_seed(5)
    seed = torch.randint(1 << 62, (1,))
    torch.manual_seed(5)
    y = lora_linear(base, x, a, b, 0.5, dropout=0.25)
    want, grads = reference(base, x, a, b, 0.5, mask(seed, x.shape, 0.25).double() / 0.75)
    close(y, want, dtype, 60)
    y.backward(torch.cos(want).to(dtype))
    slack = 1e-4 if dtype != torch.bfloat16 else 0.1
    for tensor, grad in zip((base, x, a, b), grads, strict=True):
        torch.testing.assert_close(tensor.grad.double(), grad, rtol=slack, atol=slack)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_mask_keeps_the_right_share(dropout):
    count = 200_001
    kept = mask(torch.tensor([3]), (3, count // 3), dropout).double().mean().item()
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert abs(kept - (1 - dropout)) < 5 * deviation + 2**-16


def test_masks_of_rows_and_seeds_differ():
    masks = mask(torch.tensor([3]), (50, 64), 0.5), mask(torch.tensor([4]), (50, 64), 0.5)
    assert len(set(map(tuple, torch.cat(masks).tolist()))) == 100
    wide = mask(torch.tensor([3]), (50, 1000), 0.5)
    assert torch.equal(wide[:, :64], masks[0])  # of the row and the column, not of the shape


def test_autocast_does_not_lower_the_precision_on_the_cpu():
    base, x, a, b = make((9,), 33, 4, 8)
    want, _ = reference(base, x, a, b, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(base, x, a, b, 1.0)
        y.sum().backward()
    close(y, want, torch.float32, 40)


def test_gradients_against_differences():
    base, x, a, b = (t.detach().double().requires_grad_() for t in make((3,), 5, 2, 4))
    assert compute_dtype(x, a) == torch.float64
    assert torch.autograd.gradcheck(lambda *t: lora_linear(*t, 0.3), (base, x, a, b))


def test_frozen_factors_get_no_gradient():
    base, x, a, b = make((3,), 5, 2, 4)
    a.requires_grad_(False)
    lora_linear(base, x, a, b, 1.0).sum().backward()
    assert a.grad is None and b.grad is not None


def test_inplace_writes_into_base():
    base, x, a, b = (t.detach() for t in make((3,), 5, 2, 4))
    y = lora_linear(base, x, a, b, 1.0, inplace=True)
    assert y.data_ptr() == base.data_ptr()
    strided = torch.zeros(4, 3).T
    assert lora_linear(strided, x, a, b, 1.0, inplace=True) is not strided


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.update(x=t["x"][:, :-1]), r"x \[3, 4\], a \[2, 5\]"),
        (lambda t: t.update(base=t["base"][:-1]), r"base \[2, 4\]"),
        (lambda t: t.update(b=t["b"].T), r"b \[2, 4\]"),
        (lambda t: t.update(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_errors(change, text):
    arguments = dict(zip(("base", "x", "a", "b"), make((3,), 5, 2, 4), strict=True), scaling=1.0)
    change(arguments)
    with pytest.raises(ValueError, match=text):
        lora_linear(**arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(dtype, dropout):
    base, x, a, b = make((3, 5), 16, 4, 8, dtype)
    seed = torch.tensor([7]) if dropout else None
    rest = a, b, 0.5, dropout, seed, torch.float32
    torch.library.opcheck(torch.ops.pyqlora.lora_linear, (base, x, *rest))
    inputs = (base.detach(), x.detach(), torch.randn(15, 4), a.detach(), b.detach(), *rest[2:])
    torch.library.opcheck(torch.ops.pyqlora.lora_linear_backward, inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiles_whole(dropout):
    base, x, a, b = make((6,), 16, 4, 8)

    def f(base, x, a, b):
        return torch.nn.functional.silu(lora_linear(base * 1, x, a, b, 0.5, dropout, inplace=True)).sum()

    results = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        grads = torch.autograd.grad(function(base, x, a, b), (base, x, a, b))
        results.append(grads)
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
