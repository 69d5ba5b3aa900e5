"""rotary against the formula in torch, to the bit: values and gradients, sizes, layouts, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pyqlora import _C
from pyqlora.ops.rotary import rotary, serves

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# batch, heads, kv_heads, length, dim: halves below, at and above the widths of vectors
SIZES = [(1, 1, 1, 1, 2), (2, 3, 1, 5, 14), (1, 4, 2, 7, 16), (3, 2, 2, 4, 18), (1, 9, 3, 31, 64), (2, 5, 1, 3, 254)]


def inputs(batch, heads, kv_heads, length, dim, dtype=torch.float32, positions=1, seed=0):
    """q and k as the views of projections' outputs that models make, cos, sin, and gradients of both results."""
    g = torch.Generator().manual_seed(seed)
    q, k, dq, dk = (
        torch.randn(batch, length, h, dim, generator=g).to(dtype).transpose(1, 2) for h in (heads, kv_heads) * 2
    )
    cos, sin = (torch.randn(positions, length, dim, generator=g).to(dtype) for _ in range(2))
    return [q.requires_grad_(), k.requires_grad_(), cos, sin], [dq, dk]


def formula(q, k, cos, sin):
    def rotate_half(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return tuple(x * cos + rotate_half(x) * sin for x in (q, k))


def everything(function, given, grads):
    """(rotated q and k, their gradients)."""
    out = function(*given)
    return [*out, *torch.autograd.grad(out, given[:2], grads)]


def same(got, want):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_torch(isa, sizes, dtype):
    for positions in {1, sizes[0]}:
        given, grads = inputs(*sizes, dtype=dtype, positions=positions)
        assert same(everything(rotary, given, grads), everything(formula, given, grads))
        with torch.no_grad():
            assert same(rotary(*given), formula(*given))


def test_extreme_values(isa):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e38, 1e-40, 65504.0])
    for dtype in FLOATS:
        q = values.to(dtype)[torch.cartesian_prod(*[torch.arange(8)] * 2)].view(1, 1, 1, -1).expand(1, 2, 3, -1)
        cos, sin = (values.roll(n).to(dtype).repeat(16).expand(1, 3, -1) for n in (1, 3))
        for got, want in zip(rotary(q, q, cos, sin), formula(q, q, cos, sin), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.signbit()[~got.isnan()], want.signbit()[~got.isnan()])


def test_layouts():
    given, grads = inputs(2, 4, 2, 6, 8, positions=2)
    want = everything(formula, given, grads)
    q, k, cos, sin = given
    strided = [t.detach().contiguous().requires_grad_() for t in (q, k)]  # [batch, heads, length, dim] in memory too
    angles = [torch.stack((t, t), dim=-1)[..., 0] for t in (cos, sin)]
    assert not angles[0].is_contiguous()
    assert same(everything(rotary, [*strided, *angles], [g.contiguous() for g in grads]), want)
    assert all(t.transpose(1, 2).is_contiguous() for t in rotary(*given))


def test_gradient_of_one_result():
    given, (dq, _) = inputs(1, 2, 1, 3, 4)
    (got,) = torch.autograd.grad(rotary(*given)[0], given[0], dq)
    (want,) = torch.autograd.grad(formula(*given)[0], given[0], dq)
    assert torch.equal(got, want)


def test_no_rows():
    given, grads = inputs(0, 2, 1, 3, 4)
    assert [t.shape for t in everything(rotary, given, grads)] == [t.shape for t in everything(formula, given, grads)]


def test_the_same_bits_for_any_number_of_threads():
    given, grads = inputs(3, 9, 3, 301, 64)
    want = everything(formula, given, grads)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert same(everything(rotary, given, grads), want)
    finally:
        torch.set_num_threads(before)


def test_keeps_the_angles_alone():
    given, _ = inputs(1, 2, 1, 3, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(*given)
    assert [t.data_ptr() for t in kept] == [given[2].data_ptr(), given[3].data_ptr()]


def test_what_it_serves():
    (q, k, cos, sin), _ = inputs(2, 4, 2, 6, 8)
    assert serves(q, k, cos, sin)
    assert serves(*(t.detach().half() for t in (q, k, cos, sin)))
    assert not serves(*(t.detach().double() for t in (q, k, cos, sin)))
    assert not serves(q.bfloat16(), k.bfloat16(), cos, sin)
    assert not serves(q, k, cos.clone().requires_grad_(), sin)
    assert not serves(q, k, cos[..., :4], sin[..., :4])  # a part of each head
    assert not serves(q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1))
    assert not serves(*(t.to("meta") for t in (q, k, cos, sin)))
    _C.cpu.set_isa("scalar")
    try:
        assert not serves(q, k, cos, sin)
    finally:
        _C.cpu.set_isa("")


def test_what_it_refuses():
    (q, k, cos, sin), (dq, _) = inputs(2, 4, 2, 6, 8)
    message = (
        r"rotary: expected q \[batch, heads, length, dim\], k \[batch, kv_heads, length, dim\], cos and sin "
        r"\[batch or 1, length, dim\] with an even dim, got q \[2, 4, 6, 8\], k \[2, 2, 6, 8\], cos \[1, 6, 4\], "
        r"sin \[1, 6, 4\]"
    )
    with pytest.raises(ValueError, match=message):
        rotary(q, k, cos[..., :4], sin[..., :4])
    with pytest.raises(ValueError, match="rotary: x: expected float32, got float16"):
        rotary(q.half(), k.half(), cos, sin)
    with pytest.raises(ValueError, match="rotary: cos: expected float32 or float16 or bfloat16, got another dtype"):
        rotary(q, k, cos.double(), sin)
    (grad,) = torch.autograd.grad(rotary(q, k, cos, sin)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    x, cos, sin = dq.transpose(1, 2).contiguous(), cos[0], sin[0]

    def call(x=x, cos=cos, sin=sin, heads=4, dim=8, y=None):
        _C.cpu.rotary(x, cos, sin, heads, dim, False, torch.empty_like(x) if y is None else y, 1)

    call()
    for arguments, text in (
        ({"dim": 7}, "dim: expected an even number from 2 up, got 7"),
        ({"cos": cos[0, :7].clone()}, "cos: expected rows of 8, got 7 elements"),
        ({"sin": sin[:5].clone()}, "sin: expected 48 elements, got 40"),
        ({"x": x[0, 0].clone()}, "x: expected a multiple of 4 heads of cos, got 32 elements"),
        ({"y": torch.empty(5)}, "y: expected 384 elements, got 5"),
    ):
        with pytest.raises(ValueError, match=f"rotary: {text}"):
            call(**arguments)
