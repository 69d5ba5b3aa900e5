"""rms_norm against float64: values and gradients, roundings, sizes around a vector's, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops.rms_norm import rms_norm, serves

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (1, 7), (3, 8), (2, 9), (5, 16), (4, 17), (33, 31), (300, 576), (2, 1021)]  # rows, dim
EPS = 1e-5


def inputs(rows, dim, dtype=torch.float32, weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(rows, dim, generator=g).to(dtype), torch.randn(rows, dim, generator=g)
    weight = torch.randn(dim, generator=g).to(weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy.to(torch.promote_types(x.dtype, weight.dtype))


def plain(x, weight, eps=EPS):
    """The formula in torch, with its roundings."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def compare(x, weight, dy, eps=EPS):
    """Against float64: float32 sums as long as a row or a column, and the roundings to the dtypes of x and of y."""
    y = rms_norm(x, weight, eps)
    y.backward(dy)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = plain(*leaves, eps)
    want.backward(dy.double())
    wide, scale = (t.detach() for t in leaves)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g, normal = (dy.double() * scale).abs(), (wide * rstd).abs()
    products = (dy.double() * normal).abs().sum(0)
    rows, dim = x.shape
    float_sum = 2.0**-24 * (dim / 8 + 16)
    narrow = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0
    bounds = {
        "y": (float_sum + narrow) * want.detach().abs(),
        "dx": float_sum * rstd * (g + normal * (g * normal).mean(-1, keepdim=True)) + narrow * leaves[0].grad.abs(),
        "dweight": (2.0**-24 * (rows + dim / 8 + 16) + narrow + torch.finfo(weight.dtype).eps) * products,
    }
    for (name, bound), got, exact in zip(
        bounds.items(), (y, x.grad, weight.grad), (want, leaves[0].grad, leaves[1].grad), strict=True
    ):
        smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # what rounds among subnormals
        assert got.shape == exact.shape
        assert ((got.double() - exact).abs() <= bound + smallest).all(), name
    assert y.dtype == dy.dtype
    assert x.grad.dtype == x.dtype and weight.grad.dtype == weight.dtype


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(isa, sizes):
    compare(*inputs(*sizes))


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(isa, dtype, weight_dtype):
    compare(*inputs(21, 67, dtype, weight_dtype))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_rounds_where_the_formula_does(dtype):
    x, weight, _ = inputs(64, 128, dtype)
    got, want = rms_norm(x, weight, EPS), plain(x, weight)
    assert (got != want).float().mean() < 1e-3  # a tie now and then, where float32 differs in the last place
    assert (got != plain(x.float(), weight.float()).to(dtype)).float().mean() > 0.1


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_eps_and_small_rows(isa, eps):
    x, weight, dy = inputs(8, 40)
    with torch.no_grad():
        x.mul_(1e-3)
    compare(x, weight, dy, eps)


def test_nan_and_infinity_stay_in_their_row(isa):
    x, weight, dy = inputs(4, 20)
    with torch.no_grad():
        x[1, 3], x[2, 19] = torch.nan, torch.inf
    y = rms_norm(x, weight, EPS)
    torch.testing.assert_close(y, plain(x, weight), equal_nan=True)
    y.backward(dy)
    assert y[1].isnan().all() and y[2].isnan().sum() == 1
    assert x.grad[1:3].isnan().all() and not x.grad[[0, 3]].isnan().any()


def test_shapes_strides_and_no_rows():
    x, weight, _ = inputs(24, 10)
    turned = x.detach().view(2, 3, 4, 10).transpose(1, 2).requires_grad_()
    y = rms_norm(turned, weight, EPS)
    torch.testing.assert_close(y, plain(turned, weight))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(turned.grad, torch.autograd.grad(plain(turned, weight).sum(), turned)[0])
    torch.testing.assert_close(rms_norm(x[0], weight, EPS), plain(x[0], weight))
    empty = rms_norm(torch.empty(0, 10), weight, EPS)
    assert empty.shape == (0, 10) and not torch.autograd.grad(empty.sum(), weight)[0].any()


@pytest.mark.parametrize("of_x", [True, False])
def test_only_the_gradients_asked_for(of_x):
    x, weight, dy = inputs(3, 12)
    (weight if of_x else x).requires_grad_(False)
    rms_norm(x, weight, EPS).backward(dy)
    want = torch.autograd.grad(plain(x, weight), x if of_x else weight, dy)[0]
    torch.testing.assert_close((x if of_x else weight).grad, want)
    assert (weight if of_x else x).grad is None


def test_the_same_bits_for_any_number_of_threads():
    x, weight, dy = inputs(700, 130)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = rms_norm(x, weight.detach(), EPS)
            results.append([y.detach(), *torch.autograd.grad(y, x, dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keeps_x_weight_and_a_number_for_each_row():
    x, weight, _ = inputs(30, 64, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [t.numel() for t in kept[2:]] == [30]


def test_what_it_serves():
    x, weight, _ = inputs(4, 8)
    assert serves(x, weight) and serves(x.bfloat16(), weight) and serves(x[0], weight.half())
    assert not serves(x.double(), weight) and not serves(x, weight.double())
    assert not serves(x, weight[:7]) and not serves(x, weight[None]) and not serves(x[0, 0], weight)
    assert not serves(x.to("meta"), weight.to("meta"))
    _C.cpu.set_isa("scalar")
    try:
        assert not serves(x, weight)
    finally:
        _C.cpu.set_isa("")


def test_what_it_refuses():
    x, weight, dy = inputs(4, 8)
    with pytest.raises(ValueError, match=r"rms_norm: expected x .* got x \[4, 8\], weight \[7\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="rms_norm: x: expected float32 or float16 or bfloat16, got another dtype"):
        rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match="rms_norm: weight: expected float32 or float16 or bfloat16, got int32"):
        rms_norm(x, weight.int(), EPS)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"rms_norm: eps: expected a number from 0 up, got (-1|nan)"):
            rms_norm(x, weight, eps)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    x, weight, rstd = x.detach(), weight.detach(), torch.ones(4)
    for at, wrong, message in [
        (0, x[:, :7].contiguous(), "x: expected rows as long as weight, 8, got 28 elements"),
        (3, x.half(), "y: expected float32 or float32, got float16"),
        (3, x[:3], "y: expected 32 elements, got 24"),
        (4, rstd[:3], "rstd: expected 4 elements, got 3"),
    ]:
        arguments = [x, weight, EPS, dy, rstd]
        arguments[at] = wrong
        with pytest.raises(ValueError, match=f"rms_norm: {message}"):
            _C.cpu.rms_norm(*arguments, 1)
    for at, wrong, message in [
        (2, rstd[:3], "rstd: expected 4 elements, got 3"),
        (3, dy[:3], "dy: expected 32 elements, got 24"),
        (4, x.half(), "dx: expected float32, got float16"),
    ]:
        arguments = [x, weight, rstd, dy, torch.empty_like(x)]
        arguments[at] = wrong
        with pytest.raises(ValueError, match=f"rms_norm_backward: {message}"):
            _C.cpu.rms_norm_backward(*arguments, 1)
