"""lora_linear on a 4-bit weight in one function, where CUDA kernels serve x: y = x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ.

Few rows: the update is part of the kernel that multiplies with W. Many: it is added to that product in place. Backward,
the update's part of dx is added to that of W in place, and x is all that is kept of the size of x or y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora.ops import linear_4bit_cuda, lora_linear
from pyqlora.ops import lora_linear_cuda as kernels
from pyqlora.ops.backend import is_plain, on_gpu


def serves(x: Tensor) -> bool:
    """Whether `lora_linear_4bit` takes x; elsewhere linear_4bit and lora_linear follow each other."""
    return on_gpu(x) and is_plain(x) and not torch.is_autocast_enabled(x.device.type) and kernels.serves(x)


class _LoraLinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, bias, weight, shape, scaling, dropout, seed):
        h = lora_linear.down(x, a, scaling, dropout, seed, x.dtype)
        ctx.save_for_backward(x, h, a, b, seed, *weight[:5])
        ctx.rest, ctx.shape, ctx.scaling, ctx.dropout = weight[5:], shape, scaling, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear_4bit_cuda.forward(x, weight, shape, bias, (h, b.contiguous()))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, a, b, seed, *scales = ctx.saved_tensors
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        dx = dbias = None
        if need_x:
            dx = torch.matmul(dy, linear_4bit_cuda.whole((*scales, *ctx.rest), ctx.shape, dy.dtype))
        dx, da, db = lora_linear.gradients(
            dy, x, h, a, b, ctx.scaling, ctx.dropout, seed, x.dtype, need_x, need_a, need_b, dx
        )
        if need_bias:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, da, db, dbias, None, None, None, None, None


def lora_linear_4bit(
    x: Tensor,
    weight: tuple,
    shape: list[int],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """x·Wᵀ + bias + scaling · (drop(x)·Aᵀ)·Bᵀ for an x that `serves`.

    Args:
        x: [..., K] in fp16 or bf16, on a GPU.
        weight: W as in `pyqlora.ops.linear_4bit`: packed to quant_type.
        shape: [N, K] of W.
        bias: [N] or None.
        a: [r, K], any float.
        b: [N, r], like A.
        scaling, dropout: as in `pyqlora.ops.lora_linear`.

    Returns:
        [..., N] in x's dtype. Differentiable in x, A, B and bias.

    Raises:
        ValueError: an argument has the wrong dtype, device or size; the message names it.
    """
    seed = lora_linear.draw_seed(x, dropout)
    return _LoraLinear4bit.apply(x, a, b, bias, weight, shape, scaling, dropout, seed)
