"""lora_linear: y = base + s·(drop(x)·Aᵀ)·Bᵀ as one autograd function.

    x [M, K], A [r, K], B [N, r], base and y [M, N]; h = drop(x)·Aᵀ is [M, r]

Kept for the backward pass are x as it came, A, B, h and the seed of the dropout mask: nothing else of the size of x or
y. The scale is folded into h. Arithmetic runs in one dtype, and y is rounded once to the dtype of `base`:

    on the CPU     float32, for bf16 and fp16 matrix products there are slower than converting
    under autocast autocast's dtype
    else           the wider one of x and A
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_KEEP_LEVELS = 1 << 16


def lora_linear(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0, *, inplace: bool = False
) -> Tensor:
    """Add a low-rank update to the output of a linear layer.

    Args:
        base: [..., N], the layer's own output; fp32, fp16 or bf16.
        x: [..., K], the layer's input.
        a: [r, K].
        b: [N, r].
        scaling: factor s of the update.
        dropout: probability of zeroing an element of x, in steps of 2⁻¹⁶; the kept ones grow by 1/(1 − dropout). The
            mask follows from a seed drawn from torch's default generator.
        inplace: `base` may be overwritten, and is the result unless it is strided or a view.

    Returns:
        [..., N] in the dtype of `base`.

    Raises:
        ValueError: shapes that do not fit together, or a dropout outside [0, 1).
    """
    _check(base, x, a, b, dropout)
    seed = int(torch.randint(1 << 62, ()).item()) if dropout else 0
    inplace = inplace and base.is_contiguous() and not base._is_view()
    return _LoraLinear.apply(base, x, a, b, scaling, dropout, seed, compute_dtype(x, a), inplace)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which an adapter multiplies x with its weight; see the head of this file."""
    if x.device.type == "cpu":
        return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, weight.dtype)


def keep_mask(seed: int, shape: torch.Size, dropout: float, device: torch.device) -> Tensor:
    """The boolean mask of a seed: True with probability 1 − dropout, four elements for each 64-bit draw."""
    count = shape.numel()
    generator = torch.Generator(device).manual_seed(seed)
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    first_kept = min(round(dropout * _KEEP_LEVELS), _KEEP_LEVELS - 1) - _KEEP_LEVELS // 2
    return (draws.view(torch.int16)[:count] >= first_kept).view(shape)


def _check(base: Tensor, x: Tensor, a: Tensor, b: Tensor, dropout: float) -> None:
    fits = (
        a.dim() == b.dim() == 2
        and a.shape[0] == b.shape[1]
        and x.shape[-1:] == a.shape[1:]
        and base.shape == (*x.shape[:-1], b.shape[0])
    )
    if not fits:
        raise ValueError(
            f"lora_linear: expected base [..., N], x [..., K], a [r, K], b [N, r], got base {list(base.shape)}, "
            f"x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_linear: dropout must be in [0, 1), got {dropout}")


def _dropped(x: Tensor, seed: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """The rows of x in the arithmetic's dtype, with the mask applied but not yet scaled by 1/(1 − dropout)."""
    rows = x.reshape(-1, x.shape[-1])
    if not dropout:
        return rows.to(dtype)
    return rows.to(dtype) * keep_mask(seed, rows.shape, dropout, x.device)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, x, a, b, scaling, dropout, seed, dtype, inplace):
        scale = scaling / (1.0 - dropout)
        with torch.autocast(x.device.type, enabled=False):
            h = torch.mm(_dropped(x, seed, dropout, dtype), a.to(dtype).t()).mul_(scale)
            rows = base.reshape(-1, base.shape[-1])
            if base.dtype == dtype and not inplace:
                y = torch.addmm(rows, h, b.to(dtype).t()).view(base.shape)
            elif base.dtype == dtype:
                y = base
                rows.addmm_(h, b.to(dtype).t())
            else:
                update = torch.mm(h, b.to(dtype).t()).view(base.shape)
                y = base.add_(update) if inplace else update.add_(base).to(base.dtype)
        if inplace:
            ctx.mark_dirty(base)
        ctx.save_for_backward(x, a, b, h)
        ctx.scale, ctx.dropout, ctx.seed, ctx.dtype = scale, dropout, seed, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, a, b, h = ctx.saved_tensors
        need_base, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
            if need_b:
                db = torch.mm(g.t(), h).to(b.dtype)
            if need_x or need_a:
                gb = torch.mm(g, b.to(ctx.dtype)).mul_(ctx.scale)
            if need_a:
                da = torch.mm(gb.t(), _dropped(x, ctx.seed, ctx.dropout, ctx.dtype)).to(a.dtype)
            if need_x:
                dx = torch.mm(gb, a.to(ctx.dtype))
                if ctx.dropout:
                    dx.mul_(keep_mask(ctx.seed, dx.shape, ctx.dropout, dx.device))
                dx = dx.view(x.shape).to(x.dtype)
        return grad if need_base else None, dx, da, db, None, None, None, None, None
