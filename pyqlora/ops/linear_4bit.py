"""linear_4bit: y = x · dequant(W)ᵀ + bias and dx = dy · dequant(W) on a packed 4-bit weight, as torch operators."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from pyqlora import _C
from pyqlora.ops.backend import native
from pyqlora.ops.quantize import dequantize_4bit_into

library = torch.library.Library("pyqlora", "FRAGMENT")

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
    "int nested_blocksize, int blocksize, str quant_type, SymInt[] shape"
)
library.define(f"linear_4bit(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
library.define(f"linear_4bit_backward(Tensor dy, {_WEIGHT}) -> Tensor")

# On the CPU no more than this much of W is ever held dequantized: one workspace per Python thread.
_WORKSPACE_BYTES = 4 << 20
_local = threading.local()


@torch.library.register_fake("pyqlora::linear_4bit", lib=library)
def _(x, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("pyqlora::linear_4bit_backward", lib=library)
def _(dy, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape):
    return dy.new_empty((*dy.shape[:-1], shape[1]))


def _check(arg: str, x: Tensor, columns: int) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"linear_4bit: {arg}: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"linear_4bit: {arg}: expected a last dimension of {columns}, got shape {list(x.shape)}")


def _panels(weight: tuple, shape: list[int], device: torch.device):
    """(first row, last row, float32 rows of W) one after the other, in this thread's workspace."""
    *packed_and_scales, blocksize, quant_type = weight
    n, k = shape
    rows = max(1, min(n, _WORKSPACE_BYTES // (4 * max(k, 1))))
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < rows * k:
        buffer = _local.buffer = torch.empty(max(rows * k, _WORKSPACE_BYTES // 4), device=device)
    for first in range(0, n, rows):
        last = min(first + rows, n)
        panel = buffer[: (last - first) * k].view(last - first, k)
        yield first, last, dequantize_4bit_into(panel, *packed_and_scales, blocksize, quant_type, n * k, first * k)


def _whole(weight: tuple, shape: list[int], dtype: torch.dtype) -> Tensor:
    *packed_and_scales, blocksize, quant_type = weight
    out = weight[0].new_empty(tuple(shape), dtype=dtype)
    return dequantize_4bit_into(out, *packed_and_scales, blocksize, quant_type, math.prod(shape))


def _forward(
    x, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, bias
):
    n, k = shape
    _check("x", x, k)
    weight = (packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type)
    if native(x)[0] is not _C.cpu:
        return torch.nn.functional.linear(x, _whole(weight, shape, x.dtype), None if bias is None else bias.to(x.dtype))
    x2 = x.reshape(-1, k).float()
    y = x2.new_empty((x2.shape[0], n))
    for first, last, panel in _panels(weight, shape, x.device):
        torch.mm(x2, panel.t(), out=y[:, first:last])
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], n)


def _backward(dy, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape):
    n, k = shape
    _check("dy", dy, n)
    weight = (packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type)
    if native(dy)[0] is not _C.cpu:
        return torch.matmul(dy, _whole(weight, shape, dy.dtype))
    dy2 = dy.reshape(-1, n).float()
    dx = dy2.new_zeros((dy2.shape[0], k))
    for first, last, panel in _panels(weight, shape, dy.device):
        dx.addmm_(dy2[:, first:last], panel)
    return dx.to(dy.dtype).view(*dy.shape[:-1], k)


for _key in ("CPU", "CUDA"):
    library.impl("linear_4bit", _forward, _key)
    library.impl("linear_4bit_backward", _backward, _key)


def _save(ctx, inputs, output):
    _, *weight, shape, bias = inputs
    ctx.save_for_backward(*weight[:5])
    ctx.rest = (*weight[5:], shape)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grads(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.pyqlora.linear_4bit_backward(dy, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[10]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (dx, *(None,) * 9, dbias)


torch.library.register_autograd("pyqlora::linear_4bit", _grads, setup_context=_save, lib=library)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + bias for a W of `shape` [N, K] packed as `quantize_4bit` does (see `pyqlora.functional` for the format).

    x is [..., K] in float32, float16 or bfloat16; the result is [..., N] in x's dtype. On a CPU the arithmetic is
    float32 whatever x is, rounded once at the end, and W is decoded in pieces of at most 4 MiB. Differentiable in x and
    bias, not in W.

    Raises:
        ValueError: an argument has the wrong dtype, device or size; the message names it.
    """
    return torch.ops.pyqlora.linear_4bit(
        x, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, bias
    )
