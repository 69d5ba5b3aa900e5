"""rms_norm: y = weight · round(x / √(mean(x²) + eps)) over the last dimension, on a CPU, as Llama's norm computes it.

    x [..., dim], weight [dim], mean(x²) [..., 1]

Computed in float32; round() is to the dtype of x. Kept for the backward pass are x, weight and a number for each row.
On a GPU torch's own operations are used.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops.backend import fast_on_cpu, native
from pyqlora.ops.output import empty_output

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these, and is fast."""
    return fast_on_cpu(x, weight) and x.dtype in _FLOATS and weight.dtype in _FLOATS and _fits(x, weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return weight.dim() == 1 and x.dim() > 0 and x.shape[-1] == len(weight) > 0


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.contiguous(), weight.contiguous()
        y = empty_output(x, x.shape, torch.promote_types(x.dtype, weight.dtype))
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        module, threads = native(x)
        module.rms_norm(x, weight, eps, y, rstd, threads)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = empty_output(x, x.shape)
            module, threads = native(x)
            module.rms_norm_backward(x, weight, rstd, dy, dx, threads)
        if ctx.needs_input_grad[1]:
            products = (x.float() * rstd).to(x.dtype).float() * dy.float()
            dweight = products.view(-1, len(weight)).sum(0).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of x over the root of its mean square, times weight.

    Args:
        x: [..., dim], float32, float16 or bfloat16.
        weight: [dim], of any of these dtypes.
        eps: added to the mean square.

    Returns:
        [..., dim] in the dtype that x and weight promote to. Differentiable once in x and weight.

    Raises:
        ValueError: an argument has the wrong dtype or size; the message names it.
    """
    if not _fits(x, weight):
        raise ValueError(
            "rms_norm: expected x [..., dim] and weight [dim] with a dim of at least 1, "
            f"got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    return _RmsNorm.apply(x, weight, eps)
