"""torch.ops.bitsandbytes: the operators of bitsandbytes by name and schema, on those of pyqlora."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora import quant

_GEMM = (
    "Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None"
)
_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"
_QUANTIZE = "Tensor A, int blocksize, str quant_type, ScalarType quant_storage"
_DEQUANTIZE = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_DEQUANTIZE_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_OUT = ", Tensor(a!) out) -> ()"


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return torch.ops.pyqlora.dequantize_4bit(
        quant.packed_bytes(A), absmax, None, None, None, quant.NESTED_BLOCKSIZE, blocksize, quant_type, shape, dtype
    )


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    if absmax_8bit is None:
        scales = absmax, None, None, None
    else:
        scales = absmax_8bit, absmax, absmax_code, absmax_offset.float()
    return torch.ops.pyqlora.linear_4bit(
        A, quant.packed_bytes(B), *scales, quant.NESTED_BLOCKSIZE, blocksize, quant_type, shapeB, bias
    )


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    for quant_type in quant.QUANT_TYPES:
        if torch.equal(code, quant.code_table(quant_type, code.device)):
            return _gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type)
    raise ValueError("gemv_4bit: code: expected get_4bit_type('nf4') or get_4bit_type('fp4'), got other values")


def _gemv_4bit_fake(A, B, shapeB, absmax, code, blocksize):
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.ops.pyqlora.quantize_blockwise(A, code, blocksize)


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.pyqlora.dequantize_blockwise(A, code, absmax, blocksize, dtype)


def _into_out(op):
    def run(*args) -> None:
        *inputs, out = args
        out.copy_(op(*inputs))

    return run


_OPS = {
    f"quantize_4bit({_QUANTIZE}) -> (Tensor, Tensor)": quant.pack_4bit,
    f"dequantize_4bit({_DEQUANTIZE}) -> Tensor": _dequantize_4bit,
    f"dequantize_4bit.out({_DEQUANTIZE}{_OUT}": _into_out(_dequantize_4bit),
    f"gemm_4bit({_GEMM}) -> Tensor": _gemm_4bit,
    f"gemv_4bit({_GEMV}) -> Tensor": _gemv_4bit,
    f"gemv_4bit.out({_GEMV}{_OUT}": _into_out(_gemv_4bit),
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)": _quantize_blockwise,
    f"dequantize_blockwise({_DEQUANTIZE_BLOCKWISE}) -> Tensor": _dequantize_blockwise,
    f"dequantize_blockwise.out({_DEQUANTIZE_BLOCKWISE}{_OUT}": _into_out(_dequantize_blockwise),
}

_library: torch.library.Library | None = None


def register() -> None:
    """Define the operators, unless bitsandbytes itself has done so in this process."""
    global _library
    if _library is not None or hasattr(torch.ops.bitsandbytes, "quantize_4bit"):
        return
    _library = torch.library.Library("bitsandbytes", "FRAGMENT")
    for schema, run in _OPS.items():
        name = schema.partition("(")[0]
        _library.define(schema)
        if run is _gemv_4bit:  # reads the code table, which a fake tensor has not
            _library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"bitsandbytes::{name}", _gemv_4bit_fake, lib=_library)
        else:
            _library.impl(name, run, "CompositeImplicitAutograd")


def unregister() -> None:
    """Take the definitions back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
