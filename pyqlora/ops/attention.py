"""attention: softmax(scale · q·kᵀ + mask)·v on a CPU, as scaled_dot_product_attention computes it, in float32.

    q [batch, heads, queries, dim], k [batch, kv_heads, keys, dim], v [batch, kv_heads, keys, value_dim]

Kept for the backward pass are q, k and v as they came and a logarithm for each query. What a mask hides behind the last
visible key of a block of queries is not computed, so a causal mask halves the work. On a GPU torch's own is used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops.backend import fast_on_cpu, native
from pyqlora.ops.output import empty_output
from pyqlora.ops.selective_checkpointing import kept

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` takes these, and is fast."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    return (
        fast_on_cpu(*tensors)
        and q.dtype in _FLOATS
        and q.dtype == k.dtype == v.dtype
        and q.dim() == k.dim() == v.dim() == 4
        and (mask is None or (mask.dim() == 4 and mask.dtype in (torch.bool, torch.float32) and not mask.requires_grad))
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # no copy of a projection's output
        sizes = [*q.shape[:2], *k.shape[1:2], q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
        if mask is not None:
            mask = mask.expand(-1, -1, q.shape[1], k.shape[1]).contiguous()
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        sizes += [1, 1] if mask is None else mask.shape[:2]

        def compute() -> tuple[Tensor, Tensor]:
            out = empty_output(q, (*q.shape[:3], v.shape[3]))
            lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
            module, threads = native(q)
            module.attention(q, k, v, mask, sizes, causal, scale, out, lse, threads)
            return out, lse

        out, lse = kept(("attention", *sizes), compute)
        ctx.save_for_backward(q, k, v, mask, lse)
        ctx.rest = sizes, causal, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, mask, lse = ctx.saved_tensors
        dq, dk, dv = (empty_output(t, t.shape) for t in (q, k, v))
        module, threads = native(q)
        dout = dout.transpose(1, 2).contiguous()
        module.attention_backward(q, k, v, mask, *ctx.rest, lse, dout, dq, dk, dv, threads)
        return *(t.transpose(1, 2) for t in (dq, dk, dv)), None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention of what `serves`, with enable_gqa.

    Args:
        q, k, v: as above, float32, float16 or bfloat16; kv_heads divides heads.
        mask: broadcast to [batch or 1, heads or 1, queries, keys]: bool, true where a key is seen, or float32, added to
            the scores.
        causal: query i sees keys 0 to i, of those that the mask shows.
        scale: of the scores, by default 1/√dim.

    Returns:
        [batch, heads, queries, value_dim] in q's dtype, in memory as [batch, queries, heads, value_dim]; zero for a
        query that sees no key. Differentiable once in q, k and v.

    Raises:
        ValueError: an argument has the wrong dtype or size; the message names it.
    """
    fits = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]
    if not fits:
        raise ValueError(
            "attention: expected q [batch, heads, queries, dim], k [batch, kv_heads, keys, dim], v [batch, kv_heads, "
            f"keys, value_dim], got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    return _Attention.apply(q, k, v, mask, causal, q.shape[3] ** -0.5 if scale is None else scale)
