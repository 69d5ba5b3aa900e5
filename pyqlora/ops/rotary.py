"""rotary: x · cos + rotate_half(x) · sin for queries and keys, on a CPU, as transformers' apply_rotary_pos_emb.

    q [batch, heads, length, dim], k [batch, kv_heads, length, dim], cos and sin [batch or 1, length, dim]
    rotate_half(x) = (-x₂, x₁) for the halves of the last dimension

torch makes a dozen passes over memory of it, and as many temporaries. Rounded as these are: the same bits, and those of
the gradients. On a GPU torch's own operations are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops.backend import fast_on_cpu, native
from pyqlora.ops.output import empty_output

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes these, and is fast."""
    return (
        fast_on_cpu(q, k, cos, sin)
        and q.dtype in _FLOATS
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
        and _fits(q, k, cos, sin)
    )


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.numel()):
        return False
    batch, heads, length, dim = q.shape
    kv_batch, kv_heads, *rest = k.shape
    return (
        kv_batch == batch
        and rest == [length, dim]
        and cos.shape[1:] == (length, dim)
        and cos.shape[0] in (1, batch)
        and heads > 0
        and kv_heads > 0
        and dim % 2 == 0
    )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # no copy of a projection's output
    y = empty_output(x, x.shape)
    module, threads = native(x)
    module.rotary(x, cos, sin, *x.shape[2:], backward, y, threads)
    return y.transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin, False), _rotated(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return _rotated(dq, cos, sin, True), _rotated(dk, cos, sin, True), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with rotary position embedding (Su et al., RoFormer, https://arxiv.org/abs/2104.09864).

    Args:
        q, k: as above, float32, float16 or bfloat16, all four of one dtype.
        cos, sin: of the angles by position, the same for all heads.

    Returns:
        q and k rotated, in memory as [batch, length, heads, dim]. Differentiable once in q and k.

    Raises:
        ValueError: an argument has the wrong dtype or size; the message names it.
    """
    if not _fits(q, k, cos, sin):
        raise ValueError(
            "rotary: expected q [batch, heads, length, dim], k [batch, kv_heads, length, dim], cos and sin "
            f"[batch or 1, length, dim] with an even dim, got q {list(q.shape)}, k {list(k.shape)}, cos "
            f"{list(cos.shape)}, sin {list(sin.shape)}"
        )
    cos, sin = cos.contiguous(), sin.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotary.apply(q, k, cos, sin)
    return _rotated(q, cos, sin, False), _rotated(k, cos, sin, False)
