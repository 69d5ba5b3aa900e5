"""attention against softmax in float64: values and gradients, masks, sizes around a block's, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pyqlora.ops.attention import attention, serves

# batch, heads, kv_heads, queries, keys, dim, value_dim; a block has 144 queries of one head, 72 of two, ...
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 5, 3),
    (1, 4, 2, 71, 71, 8, 8),
    (1, 2, 1, 72, 72, 16, 24),
    (2, 2, 1, 73, 73, 64, 64),
    (1, 1, 1, 145, 289, 33, 17),
    (1, 6, 2, 131, 131, 64, 64),
    (1, 150, 1, 3, 3, 4, 4),
]


def inputs(sizes, dtype=torch.float32, seed=0):
    batch, heads, kv_heads, queries, keys, dim, value_dim = sizes
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim)
    shapes += ((batch, queries, heads, value_dim),)
    q, k, v, dout = (torch.randn(shape, generator=g).to(dtype).transpose(1, 2) for shape in shapes)
    return [t.requires_grad_() for t in (q, k, v)], dout


def exact(q, k, v, dout, mask=None, causal=False, scale=None):
    """(out, dq, dk, dv) in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    q, k, v = leaves
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    p = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    out = p @ v
    out.backward(dout.double())
    return [out.detach()] + [leaf.grad for leaf in leaves]


def compare(tensors, dout, dtype, **arguments):
    """Up to two roundings to dtype, and of sums of float32 products as long as the longest axis."""
    out = attention(*tensors, **arguments)
    assert out.dtype == dtype
    out.backward(dout)
    results = [out.detach()] + [t.grad for t in tensors]
    terms = max(max(t.shape) for t in tensors) + 16
    for name, got, want in zip(("out", "dq", "dk", "dv"), results, exact(*tensors, dout, **arguments), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        bound = torch.finfo(dtype).eps * want.abs() + 2.0**-23 * terms * want.abs().max().clamp(min=1)
        assert ((got.double() - want).abs() <= bound).all(), (name, ((got.double() - want).abs() / bound).max())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_float64(isa, sizes, causal):
    compare(*inputs(sizes), torch.float32, causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_once(dtype):
    compare(*inputs((2, 4, 2, 75, 75, 24, 24), dtype), dtype, causal=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(isa, shape, kind, causal):
    tensors, dout = inputs((2, 4, 2, 80, 83, 8, 8))
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(*shape, 80, 83, generator=g) < 0.7
    mask[..., 60:] = False  # padding behind
    mask[:, :, 5] = False  # a query that sees nothing
    mask[-1] = False  # nor does a whole row of the batch, where the mask has one
    if kind == "float":
        mask = torch.where(mask, torch.randn(mask.shape, generator=g), -torch.inf)
    compare(tensors, dout, torch.float32, mask=mask, causal=causal)


def test_a_mask_broadcasts_and_a_minimum_is_no_infinity():
    tensors, dout = inputs((2, 2, 2, 9, 11, 4, 4))
    compare(tensors, dout, torch.float32, mask=torch.arange(11).lt(6)[None, None, None])
    tensors, dout = inputs((2, 2, 2, 9, 11, 4, 4))
    lowest = torch.full((1, 1, 9, 11), torch.finfo(torch.float32).min)
    lowest[..., 3:, :4] = 0
    out = attention(*tensors, mask=lowest)
    torch.testing.assert_close(out[:, :, 0], tensors[2].mean(2))  # as large a number for every key: all alike


def test_scale_and_memory_layouts():
    tensors, dout = inputs((1, 2, 1, 20, 20, 8, 8))
    compare(tensors, dout, torch.float32, scale=0.03)
    tensors = [t.detach().contiguous().requires_grad_() for t in tensors]
    compare(tensors, dout.contiguous(), torch.float32, scale=-0.5)
    out = attention(*tensors)
    assert out.transpose(1, 2).is_contiguous()


def test_large_scores_and_nan():
    tensors, dout = inputs((1, 1, 1, 30, 30, 8, 8))
    with torch.no_grad():
        tensors[0].mul_(300)
    out = attention(*tensors, causal=True)
    torch.testing.assert_close(out.double(), exact(*tensors, dout, causal=True)[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        tensors[0][0, 0, 7, 3] = torch.nan
    out = attention(*tensors, causal=True)
    assert out[0, 0, 7].isnan().all() and not out[0, 0, :7].isnan().any() and not out[0, 0, 8:].isnan().any()


def test_exponentials(isa):
    """One key's score against another of 0, over the range of exp."""
    x = torch.cat([torch.linspace(-90, 0, 9001), torch.tensor([-87.0, -87.1, -1e4, -torch.inf])])
    q = torch.ones(1, 1, 1, 1)
    k = torch.zeros(1, 1, len(x), 1)
    lse = attention(q, k, torch.ones(1, 1, len(x), 1), mask=x[None, None, None])
    assert lse.item() == pytest.approx(1, rel=1e-6)
    weights = attention(q, k, torch.eye(len(x))[None, None], mask=x[None, None, None])[0, 0, 0].double()
    want = x.double().softmax(0)
    normal = x >= -87
    assert ((weights - want)[normal].abs() <= want[normal] * 2.0**-23 * 64).all()
    assert (weights[~normal] == 0).all()


def test_the_same_bits_for_any_number_of_threads():
    tensors, dout = inputs((1, 6, 2, 300, 300, 16, 16))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = attention(*tensors, causal=True)
            results.append([out.detach(), *torch.autograd.grad(out, tensors, dout)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keeps_what_it_got_and_a_number_for_each_query():
    tensors, _ = inputs((1, 4, 2, 40, 40, 16, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(*tensors, causal=True)
    assert {t.data_ptr() for t in kept[:3]} == {t.data_ptr() for t in tensors}
    assert sum(t.numel() for t in kept[3:]) == 4 * 40


def test_what_it_serves():
    (q, k, v), _ = inputs((1, 2, 1, 4, 4, 8, 8))
    assert serves(q, k, v, None) and serves(q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert not serves(q.double(), k.double(), v.double(), None)
    assert not serves(q, k, v.bfloat16(), None)
    assert not serves(q[0], k[0], v[0], None)
    assert not serves(q, k, v, torch.ones(4, 4, dtype=torch.bool))
    assert not serves(q, k, v, torch.zeros(1, 1, 4, 4, requires_grad=True))
    assert not serves(*(t.to("meta") for t in (q, k, v)), None)


def test_what_it_refuses():
    (q, k, v), _ = inputs((2, 4, 2, 6, 6, 8, 8))
    with pytest.raises(ValueError, match=r"attention: expected q \[batch, .*got q \[2, 4, 6, 8\], k \[2, 2, 6, 7\]"):
        attention(q, k[..., :7], v)
    with pytest.raises(ValueError, match="attention: heads: expected a multiple of 2, got 3"):
        attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="attention: k: expected float32, got bfloat16"):
        attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="attention: q: expected float32 or float16 or bfloat16, got another dtype"):
        attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match=r"attention: mask: expected \[2 or 1, 4 or 1, queries, keys\], got \[2, 3"):
        attention(q, k, v, mask=torch.zeros(2, 3, 6, 6))
    with pytest.raises(ValueError, match="attention: mask: expected uint8 or float32, got float16"):
        attention(q, k, v, mask=torch.zeros(2, 1, 6, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="attention: sizes: expected positive numbers, got 0"):
        attention(q[:, :, :0], k, v)
    with pytest.raises(RuntimeError, match="expanded size"):
        attention(q, k, v, mask=torch.zeros(1, 1, 6, 5))
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
