"""linear_4bit on a GPU: which kernel serves a shape, and its call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyqlora.ops.backend import native
from pyqlora.ops.quantize import dequantize_4bit_into

# For more rows of x, W is decoded into memory and left to torch.matmul.
_SIMT_ROWS = 4


def forward(x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None) -> Tensor:
    """x [..., K] · Wᵀ + bias; `weight` is (packed, absmax, nested_*, offset, nested_blocksize, blocksize, type)."""
    if math.prod(x.shape[:-1]) <= _SIMT_ROWS:
        return simt(x, weight, shape, bias)
    return torch.nn.functional.linear(x, whole(weight, shape, x.dtype), None if bias is None else bias.to(x.dtype))


def simt(x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None) -> Tensor:
    """The kernel for any dtype and shape."""
    *packed_and_scales, blocksize, quant_type = weight
    y = x.new_empty((*x.shape[:-1], shape[0]))
    module, context = native(x)
    module.linear_4bit(x.contiguous(), *packed_and_scales, bias, y, *shape, blocksize, quant_type, context)
    return y


def whole(weight: tuple, shape: list[int], dtype: torch.dtype) -> Tensor:
    """W [N, K] decoded in one launch, into memory that torch's allocator hands out again on the same stream."""
    out = weight[0].new_empty(tuple(shape), dtype=dtype)
    return dequantize_4bit_into(out, *weight, math.prod(shape))
