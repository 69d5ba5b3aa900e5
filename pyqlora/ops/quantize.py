"""quantize: 4-bit (NF4, FP4) and 8-bit block quantization as torch operators; formats in `pyqlora.functional`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyqlora.ops.backend import native
from pyqlora.ops.output import empty_output

library = torch.library.Library("pyqlora", "FRAGMENT")

library.define("quantize_4bit(Tensor x, int blocksize, str quant_type) -> (Tensor, Tensor)")
library.define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
    "int nested_blocksize, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype) -> Tensor"
)
library.define("quantize_blockwise(Tensor x, Tensor code, int blocksize) -> (Tensor, Tensor)")
library.define("dequantize_blockwise(Tensor q, Tensor code, Tensor absmax, int blocksize, ScalarType dtype) -> Tensor")


@torch.library.register_fake("pyqlora::quantize_4bit", lib=library)
def _(x, blocksize, quant_type):
    n = x.numel()
    packed = x.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, x.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


@torch.library.register_fake("pyqlora::dequantize_4bit", lib=library)
def _(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, quant_type, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("pyqlora::quantize_blockwise", lib=library)
def _(x, code, blocksize):
    absmax = x.new_empty(((x.numel() + blocksize - 1) // blocksize,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), absmax


@torch.library.register_fake("pyqlora::dequantize_blockwise", lib=library)
def _(q, code, absmax, blocksize, dtype):
    return q.new_empty(q.shape, dtype=dtype)


def quantize_4bit(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Pack a float tensor of n elements into (uint8 [(n+1)//2, 1], float32 absmax [ceil(n/blocksize)])."""
    x = x.contiguous()
    packed = x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = x.new_empty((-(-x.numel() // blocksize),), dtype=torch.float32)
    module, context = native(x)
    module.quantize_4bit(x, packed, absmax, blocksize, quant_type, context)
    return packed, absmax


def dequantize_4bit_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    quant_type: str,
    numel: int,
    first: int = 0,
) -> Tensor:
    """Decode elements [first, first + out.numel()) of a packed tensor of `numel` elements into `out`.

    `out` (float32, float16 or bfloat16) is contiguous, or a view with gaps between its rows, as
    `workspace[:, :columns]`; what lies in the gaps stays.

    Raises:
        ValueError: `out` has other strides, or a tensor does not fit the others.
    """
    module, context = native(out)
    module.dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_code,
        offset,
        nested_blocksize,
        out,
        numel,
        first,
        blocksize,
        quant_type,
        context,
    )
    return out


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a packed tensor into a new one of `shape` and `dtype`; nested constants are decoded in the same pass."""
    out = empty_output(packed, shape, dtype)
    return dequantize_4bit_into(
        out,
        packed,
        absmax,
        nested_absmax,
        nested_code,
        offset,
        nested_blocksize,
        blocksize,
        quant_type,
        math.prod(shape),
    )


def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """8-bit codes (uint8, the shape of x) on the map `code` (float32 [256]), and absmax per block."""
    x = x.contiguous()
    q = torch.empty_like(x, dtype=torch.uint8)
    absmax = x.new_empty((-(-x.numel() // blocksize),), dtype=torch.float32)
    module, context = native(x)
    module.quantize_blockwise(x, code, q, absmax, blocksize, context)
    return q, absmax


def dequantize_blockwise(q: Tensor, code: Tensor, absmax: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """`code[q] * absmax` of each block, in `dtype`."""
    q = q.contiguous()
    out = torch.empty_like(q, dtype=dtype)
    module, context = native(q)
    module.dequantize_blockwise(q, code, absmax, out, blocksize, context)
    return out


for _key in ("CPU", "CUDA"):
    library.impl("quantize_4bit", quantize_4bit, _key)
    library.impl("dequantize_4bit", dequantize_4bit, _key)
    library.impl("quantize_blockwise", quantize_blockwise, _key)
    library.impl("dequantize_blockwise", dequantize_blockwise, _key)
