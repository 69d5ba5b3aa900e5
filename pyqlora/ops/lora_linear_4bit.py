"""lora_linear on a 4-bit weight in one function: y = x·Wᵀ + bias + s·(drop(x)·Aᵀ)·Bᵀ.

The update is part of the kernel that multiplies with W; on a GPU for few rows only, for many it is added to the product
in place. On the CPU all of it is one native call, and so is the way back. Elsewhere the update's part of dx is added to
that of W in place. x is all that is kept of its size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqlora import _C
from pyqlora.ops import linear_4bit, linear_4bit_cuda, lora_linear, lora_linear_cuda, lora_shared_cuda
from pyqlora.ops.backend import is_plain, native, on_gpu
from pyqlora.ops.output import empty_output
from pyqlora.ops.selective_checkpointing import completed, kept

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `lora_linear_4bit` takes x and the factors; elsewhere linear_4bit and lora_linear follow each other."""
    if not is_plain(x):
        return False
    if on_gpu(x):
        return lora_linear_cuda.serves(x) and _autocast_leaves(x)
    return x.is_cpu and x.dtype in _FLOATS and a.dtype in _FLOATS and b.dtype in _FLOATS


def _autocast_leaves(x: Tensor) -> bool:
    """Whether autocast, if it is on, computes with x in the dtype that it has."""
    device = x.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype


def forward(x, a, b, bias, weight, shape, scaling, dropout, seed, keep_h=True) -> tuple[Tensor, Tensor | None]:
    """The kernels' call: (y, h = scaling · drop(x)·Aᵀ or, not `keep_h`, possibly None)."""
    n, k = shape
    whole = linear_4bit.result_shape("x", x, k, n)
    if on_gpu(x):
        h = lora_shared_cuda.down(x, a, scaling / (1.0 - dropout), seed, dropout)
        return linear_4bit_cuda.forward(x, weight, shape, bias, (h, b.contiguous())), h
    *packed_and_scales, blocksize, quant_type = weight
    y = empty_output(x, whole)
    h = x.new_empty(x.numel() // k, len(a), dtype=torch.float32) if keep_h else None
    module, threads = native(x)
    # fmt: off
    module.lora_linear_4bit(
        x.contiguous(), *packed_and_scales, bias, y, n, k, blocksize, quant_type, a.contiguous(), b.contiguous(),
        scaling / (1.0 - dropout), seed, dropout, h, linear_4bit.is_rounded(x, k, blocksize), threads,
    )
    # fmt: on
    return y, h


def prepared(x, a, b, bias, weight, shape, scaling) -> Callable[[Tensor], Tensor] | None:
    """`forward` without dropout for any x like this one; None where that is not the CPU kernels' call on these tensors.

    What is written to the tensors later counts; memory that replaces theirs does not.
    """
    n, k = shape
    module, _ = native(x)
    *scales, nested_blocksize, blocksize, quant_type = weight
    tensors = (*scales, bias, a, b)
    if module is not _C.cpu or not all(t is None or t.is_contiguous() for t in tensors):
        return None
    # Detached: their memory then stays while it is used, whatever becomes of the parameters.
    *scales, bias, a, b = (None if t is None else t.detach() for t in tensors)
    run = module.LoraLinear4bit(*scales, nested_blocksize, bias, n, k, blocksize, quant_type, a, b, scaling).run

    def call(x: Tensor) -> Tensor:
        y = x.new_empty(*linear_4bit.result_shape("x", x, k, n))
        run(x.contiguous(), y, linear_4bit.is_rounded(x, k, blocksize), torch.get_num_threads())
        return y

    return call


def backward(dy, x, h, a, b, weight, shape, scaling, dropout, seed, need_x, need_a):
    """The CPU kernels' call: (dx, dA, dB), the first two None where not needed."""
    *packed_and_scales, blocksize, quant_type = weight
    dx = empty_output(dy, x.shape) if need_x else None
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else None
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    module, threads = native(dy)
    # fmt: off
    module.lora_linear_4bit_backward(
        dy.contiguous(), *packed_and_scales, dx, *shape, blocksize, quant_type, x.contiguous(), a.contiguous(),
        b.contiguous(), h, scaling / (1.0 - dropout), seed, dropout, da, db, threads,
    )
    # fmt: on
    return dx, da, db


class _LoraLinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, bias, weight, shape, scaling, dropout, seed):
        y, h, seed = kept(
            (weight[0].data_ptr(), x.shape),
            lambda: (*forward(x, a, b, bias, weight, shape, scaling, dropout, seed), seed),
            late=True,
        )
        if y is None:
            y = empty_output(x, (*x.shape[:-1], shape[0]))
        ctx.save_for_backward(x, h, a, b, seed)
        # The weight is constant: as saved tensors its parts would be half of what checkpointing's hooks handle.
        ctx.weight, ctx.shape, ctx.scaling, ctx.dropout = weight, shape, scaling, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, a, b, seed = ctx.saved_tensors
        need_x, need_a, need_b, need_bias = ctx.needs_input_grad[:4]
        dx = dbias = None
        if on_gpu(dy):
            if need_x:
                dx = linear_4bit.backward(dy, *ctx.weight, ctx.shape)
            dx, da, db = lora_linear.gradients(
                dy, x, h, a, b, ctx.scaling, ctx.dropout, seed, h.dtype, need_x, need_a, need_b, dx
            )
        else:
            dx, da, db = backward(dy, x, h, a, b, ctx.weight, ctx.shape, ctx.scaling, ctx.dropout, seed, need_x, need_a)
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
        x: [..., K]; on a GPU in fp16 or bf16.
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
    if not torch.is_grad_enabled():
        return forward(x, a, b, bias, weight, shape, scaling, dropout, seed, keep_h=False)[0]
    return completed(_LoraLinear4bit.apply(x, a, b, bias, weight, shape, scaling, dropout, seed))
