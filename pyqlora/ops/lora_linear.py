"""lora_linear: y = base + s·(drop(x)·Aᵀ)·Bᵀ and its gradients, as torch operators.

    x [M, K], A [r, K], B [N, r], base and y [M, N]; h = drop(x)·Aᵀ is [M, r]

Kept for the backward pass are x as it came, A, B, h and the seed of the dropout mask: nothing else of the size of x or
y. The scale is folded into h. Arithmetic runs in one dtype, and y is rounded once to the dtype of `base`:

    on a GPU       x's own if it has 16 bits, with float32 sums: x is never copied (`pyqlora.ops.lora_linear_cuda`)
    under autocast autocast's
    on the CPU     float32, unless x or A is float64 (`pyqlora.ops.lora_linear_cpu`)
    else           the wider one of x and A
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops import backend
from pyqlora.ops import lora_linear_cpu as on_cpu
from pyqlora.ops import lora_linear_cuda as on_gpu
from pyqlora.ops import lora_shared_cuda as shared
from pyqlora.ops.backend import is_plain, native
from pyqlora.ops.selective_checkpointing import keeping

library = torch.library.Library("pyqlora", "FRAGMENT")
_UPDATE = "Tensor a, Tensor b, float scaling, float dropout, Tensor? seed, ScalarType dtype"
library.define(f"lora_linear(Tensor base, Tensor x, {_UPDATE}) -> (Tensor, Tensor)")
library.define(f"lora_linear_backward(Tensor dy, Tensor x, Tensor h, {_UPDATE}) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("pyqlora::lora_linear", lib=library)
def _(base, x, a, b, scaling, dropout, seed, dtype):
    return base.new_empty(base.shape), x.new_empty((x.shape[:-1].numel(), a.shape[0]), dtype=dtype)


@torch.library.register_fake("pyqlora::lora_linear_backward", lib=library)
def _(dy, x, h, a, b, scaling, dropout, seed, dtype):
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which torch multiplies x with a trained weight; see the head of this file."""
    if x.device.type == "cpu":
        return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, weight.dtype)


def update_dtype(x: Tensor, a: Tensor) -> torch.dtype:
    """The dtype in which an adapter multiplies x with A; see the head of this file."""
    own = backend.on_gpu(x) and x.dtype in (torch.float16, torch.bfloat16)
    return x.dtype if own else compute_dtype(x, a)


def dropped(x: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype) -> Tensor:
    """x [M, K] in `dtype`, with the dropped elements zero and the others as they were.

    Which are dropped follows from the seed, the row and the column alone, on every device (csrc/core/philox.h).
    """
    if seed is None:
        return x.to(dtype)
    if torch.float64 in (x.dtype, dtype):
        return x.to(dtype) * dropped(torch.ones_like(x, dtype=torch.float32), seed, dropout, torch.float32)
    x = x.contiguous()
    y = x.new_empty(x.shape, dtype=torch.float32 if dtype == torch.float32 else x.dtype)
    module, context = native(x)
    module.lora_dropout(x, y, seed, dropout, x.shape[-1], context)
    return y.to(dtype)


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


def draw_seed(x: Tensor, dropout: float) -> Tensor | None:
    """A seed from torch's default generator of x's device, where it stays: nothing waits for it."""
    return torch.randint(1 << 62, (1,), device=x.device) if dropout else None


def down(x: Tensor, a: Tensor, scaling: float, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """h = scaling · drop(x)·Aᵀ [M, r] in `dtype`; here drop also scales."""
    scale = scaling / (1.0 - dropout)
    if x.dtype == dtype and on_gpu.serves(x):
        return shared.down(x, a, scale, seed, dropout)
    rows = x.reshape(-1, x.shape[-1])
    if on_cpu.serves(x, a):
        return on_cpu.down(rows, [a], [scale], seed, dropout)[0]
    return torch.mm(dropped(rows, seed, dropout, dtype), a.to(dtype).t()).mul_(scale)


def add_up(base: Tensor, h: Tensor, b: Tensor, inplace: bool) -> Tensor:
    """base + h·Bᵀ in base's dtype."""
    if on_cpu.serves(base, h, b):
        y = base if inplace else base.clone(memory_format=torch.contiguous_format)
        return on_cpu.up(h, [b], y)
    rows, b = base.reshape(-1, base.shape[-1]), b.to(h.dtype)
    if base.dtype == h.dtype and not inplace:
        return torch.addmm(rows, h, b.t()).view(base.shape)
    if base.dtype == h.dtype:
        rows.addmm_(h, b.t())
        return base
    update = torch.mm(h, b.t()).view(base.shape)
    return base.add_(update) if inplace else update.add_(base).to(base.dtype)


def gradients(dy, x, h, a, b, scaling, dropout, seed, dtype, need_x=True, need_a=True, need_b=True, dx=None):
    """(dx, dA, dB) of the update, None where not needed; onto a given `dx`, which is contiguous."""
    scale = scaling / (1.0 - dropout)
    da = db = None
    kernels = on_gpu if h.dtype == dy.dtype and on_gpu.serves(dy, x) else on_cpu
    if kernels is on_gpu or on_cpu.serves(dy, x, h, a, b):
        g = dy.contiguous()
        if need_b:
            gb, db = kernels.backward(g, b, h, scale)
        elif need_x or need_a:
            (gb,) = kernels.down(g, [b.t()], [scale])
        if need_a:
            da = kernels.backward_a(x.contiguous(), a, gb, seed, dropout)
        if need_x and kernels is on_gpu and not dropout:  # a library's product is nearer to the memory's speed
            flat, factor = gb.reshape(-1, gb.shape[-1]), a.to(gb.dtype)
            if dx is None:
                return torch.mm(flat, factor).view(x.shape), da, db
            dx.view(-1, dx.shape[-1]).addmm_(flat, factor)
        elif need_x:
            out = x.new_empty(x.shape) if dx is None else dx
            dx = kernels.up(gb, [a.t()], out, seed, dropout, accumulate=dx is not None)
        return dx, da, db
    rows, g = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(dtype)
    if need_b:
        db = torch.mm(g.t(), h).to(b.dtype)
    if need_x or need_a:
        gb = torch.mm(g, b.to(dtype)).mul_(scale)
    if need_a:
        da = torch.mm(gb.t(), dropped(rows, seed, dropout, dtype)).to(a.dtype)
    if need_x:
        update = dropped(torch.mm(gb, a.to(dtype)), seed, dropout, dtype).to(x.dtype).view(x.shape)
        dx = update if dx is None else dx.add_(update)
    return dx, da, db


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Each product in the dtype of its operands. Where autocast is off anyway nothing is switched, which takes time."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _forward(base, x, a, b, scaling, dropout, seed, dtype, inplace=False):
    with _without_autocast(x):
        h = down(x, a, scaling, dropout, seed, dtype)
        return add_up(base, h, b, inplace), h


def _backward(dy, x, h, a, b, scaling, dropout, seed, dtype):
    with _without_autocast(x):
        return gradients(dy, x, h, a, b, scaling, dropout, seed, dtype)


for _key in ("CPU", "CUDA"):
    library.impl("lora_linear", _forward, _key)
    library.impl("lora_linear_backward", _backward, _key)


def _save(ctx, inputs, output):
    _, x, a, b, ctx.scaling, ctx.dropout, seed, ctx.dtype = inputs
    ctx.save_for_backward(x, output[1], a, b, seed)


def _grads(ctx, dy, _):
    x, h, a, b, seed = ctx.saved_tensors
    grads = torch.ops.pyqlora.lora_linear_backward(dy, x, h, a, b, ctx.scaling, ctx.dropout, seed, ctx.dtype)
    needed = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:4], strict=True)]
    return dy, *needed, None, None, None, None


torch.library.register_autograd("pyqlora::lora_linear", _grads, setup_context=_save, lib=library)


class _LoraLinear(torch.autograd.Function):
    """The operator past torch's dispatcher: may write into `base`, and computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, inplace = inputs
        y, h = _forward(*inputs, inplace)
        if inplace:
            ctx.mark_dirty(inputs[0])
        _save(ctx, inputs, (y, h))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, a, b, seed = ctx.saved_tensors
        need_base, *needs = ctx.needs_input_grad[:4]
        with _without_autocast(x):
            grads = gradients(dy, x, h, a, b, ctx.scaling, ctx.dropout, seed, ctx.dtype, *needs)
        return dy if need_base else None, *grads, None, None, None, None, None


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
            mask follows from a seed drawn from torch's default generator, and is the same on every device.
        inplace: `base` may be overwritten, and is the result unless it is strided or a view.

    Returns:
        [..., N] in the dtype of `base`.

    Raises:
        ValueError: shapes that do not fit together, or a dropout outside [0, 1).
    """
    _check(base, x, a, b, dropout)
    inputs = base, x, a, b, scaling, dropout, draw_seed(x, dropout), update_dtype(x, a)
    if not is_plain(x):
        return torch.ops.pyqlora.lora_linear(*inputs)[0]
    inplace = inplace and base.is_contiguous() and not base._is_view() and not keeping()
    return _LoraLinear.apply(*inputs, inplace)
