"""linear_4bit: y = x · dequant(W)ᵀ + bias and dx = dy · dequant(W) on a packed 4-bit weight, as torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora import _C
from pyqlora.ops import linear_4bit_cuda
from pyqlora.ops.backend import is_plain, native
from pyqlora.ops.output import empty_output
from pyqlora.ops.selective_checkpointing import completed, kept

library = torch.library.Library("pyqlora", "FRAGMENT")

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
    "int nested_blocksize, int blocksize, str quant_type, SymInt[] shape"
)
library.define(f"linear_4bit(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
library.define(f"linear_4bit_backward(Tensor dy, {_WEIGHT}) -> Tensor")


@torch.library.register_fake("pyqlora::linear_4bit", lib=library)
def _(x, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("pyqlora::linear_4bit_backward", lib=library)
def _(dy, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape):
    return dy.new_empty((*dy.shape[:-1], shape[1]))


_activations = "float32"  # what the CPU rounds a single row of x to
_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def set_activation_precision(precision: str) -> str:
    """What a CPU takes a single row of activations for, in every 4-bit layer of the process; returns what it was.

    "float32", the default, is exact but for float32's rounding. "int16" is faster and needs AVX2: x is rounded to 16383
    steps of the largest of each 64 elements, the 16 values of the codes to 16384 steps. A product is then off by at
    most |w| · max|x| / 32766 + |x| · absmax / 32768, and on normal data an output by 1e-4 of the largest one. It
    serves rows that begin with a block; more rows than one, and GPUs, compute as ever.

    Raises:
        ValueError: another precision.
        RuntimeError: "int16" without AVX2.
    """
    global _activations
    if precision not in ("float32", "int16"):
        raise ValueError(f"set_activation_precision: expected 'float32' or 'int16', got {precision!r}")
    if precision == "int16" and _C.cpu.isa() == "scalar":
        raise RuntimeError("set_activation_precision: 'int16' needs a processor with AVX2; keep 'float32'")
    before, _activations = _activations, precision
    return before


def is_rounded(x: Tensor, k: int, blocksize: int) -> bool:
    """Whether x is a single row of activations that is to be rounded to 16 bits."""
    return _activations == "int16" and x.numel() == k and k % blocksize == 0


def result_shape(arg: str, x: Tensor, columns: int, width: int) -> list[int]:
    """[..., width] for an x [..., columns]; a ValueError for one that does not fit the weight."""
    *rows, last = x.shape or (None,)
    if width < 1 or columns < 1:
        shape = [width, columns] if arg == "x" else [columns, width]
        raise ValueError(f"linear_4bit: shape: expected [N, K], both positive, got {shape}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"linear_4bit: {arg}: expected float32, float16 or bfloat16, got {x.dtype}")
    if last != columns:
        raise ValueError(f"linear_4bit: {arg}: expected a last dimension of {columns}, got shape {list(x.shape)}")
    rows.append(width)
    return rows


def forward(
    x, packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, bias
) -> Tensor:
    """The kernels' call."""
    n, k = shape
    whole = result_shape("x", x, k, n)
    module, context = native(x)
    scales = (absmax, nested_absmax, nested_code, offset, nested_blocksize)
    if module is not _C.cpu:
        return linear_4bit_cuda.forward(x, [packed, *scales, blocksize, quant_type], shape, bias)
    y = empty_output(x, whole)
    kernel = module.linear_4bit_int16 if is_rounded(x, k, blocksize) else module.linear_4bit
    kernel(x.contiguous(), packed, *scales, bias, y, n, k, blocksize, quant_type, context)
    return y


def backward(dy: Tensor, *weight_shape) -> Tensor:
    """dx for dy [..., N]."""
    *weight, shape = weight_shape
    n, k = shape
    whole = result_shape("dy", dy, n, k)
    module, context = native(dy)
    if module is not _C.cpu:
        return torch.matmul(dy, linear_4bit_cuda.whole(weight, shape, dy))
    dx = empty_output(dy, whole)
    module.linear_4bit_backward(dy.contiguous(), *weight[:6], dx, n, k, *weight[6:], context)
    return dx


for _key in ("CPU", "CUDA"):
    library.impl("linear_4bit", forward, _key)
    library.impl("linear_4bit_backward", backward, _key)


def _save(ctx, inputs, output):
    _, *weight, shape, bias = inputs
    ctx.save_for_backward(*weight[:5])
    ctx.rest = (*weight[5:], shape)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grads(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        direct = is_plain(dy) and not torch.is_grad_enabled()
        dx_of = backward if direct else torch.ops.pyqlora.linear_4bit_backward
        dx = dx_of(dy, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[10]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (dx, *(None,) * 9, dbias)


def _save_backward(ctx, inputs, output):
    _save(ctx, (*inputs, None), output)


def _grads_backward(ctx, ddx):
    return torch.ops.pyqlora.linear_4bit(ddx, *ctx.saved_tensors, *ctx.rest, None), *(None,) * 9


torch.library.register_autograd("pyqlora::linear_4bit", _grads, setup_context=_save, lib=library)
torch.library.register_autograd(
    "pyqlora::linear_4bit_backward", _grads_backward, setup_context=_save_backward, lib=library
)


class _Linear4bit(torch.autograd.Function):
    """The operator's autograd without the dispatcher, which would cost several times as much as a small product."""

    @staticmethod
    def forward(ctx, *inputs):
        _save(ctx, inputs, None)
        (y,) = kept((inputs[1].data_ptr(), inputs[0].shape), lambda: (forward(*inputs),), late=True)
        return empty_output(inputs[0], (*inputs[0].shape[:-1], inputs[9][0])) if y is None else y

    backward = staticmethod(_grads)


def _trained(*inputs) -> Tensor:
    return completed(_Linear4bit.apply(*inputs))


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
    float32 whatever x is, rounded once at the end, and W is decoded a cache's worth at a time. On a
    GPU few rows go through kernels that decode W in registers, more through W decoded to x's dtype
    (`pyqlora.ops.linear_4bit_cuda`). Differentiable in x and bias, not in W.

    Raises:
        ValueError: an argument has the wrong dtype, device or size; the message names it.
    """
    call = forward
    if not is_plain(x):
        call = torch.ops.pyqlora.linear_4bit
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        call = _trained
    scales = absmax, nested_absmax, nested_code, offset, nested_blocksize
    return call(x, packed, *scales, blocksize, quant_type, shape, bias)
