"""Quantization by the names and arguments of `bitsandbytes.functional`.

A 4-bit tensor is packed two codes to a byte, the earlier element in the high nibble, with a float32 scale (absmax) per
block of elements; `pyqlora.quant` has the format, `pyqlora.ops` the operators. A device gives the bytes that
bitsandbytes gives on that device: halfway between two values, and in 8 bits near zero, its CPU and CUDA code choose
differently. Not so on a GPU: blocks of zeros or with NaN, which get the bytes of a CPU, and ties that its approximate
reciprocal decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora import quant
from pyqlora.ops import paged, paged_cuda
from pyqlora.ops.linear_4bit import linear_4bit, set_activation_precision
from pyqlora.quant import QuantState
from pyqlora.quant_maps import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "set_activation_precision",
]

# AbnormalFloat for blocks of 64 (https://arxiv.org/abs/2306.06965), a table only: no kernel quantizes to it.
_AF4 = (
    *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
    *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values (float32, by code) of "nf4", "fp4" or "af4".

    Raises:
        NotImplementedError: another type, or "af4" with a block size other than 64.
    """
    device = device or "cpu"
    if typename in quant.QUANT_TYPES:
        return quant.code_table(typename, device).clone()
    if typename == "af4" and blocksize == 64:
        return torch.tensor(_AF4, device=device)
    raise NotImplementedError(f"get_4bit_type: {typename} with blocksize {blocksize} is not supported")


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize `A` (float32, float16 or bfloat16, any shape) to 4 bits.

    Args:
        A: the tensor.
        absmax: receives the block scales, if given.
        out: receives the packed tensor, if given.
        blocksize: elements per block: 32, 64 (the default), 128 … 4096.
        compress_statistics: quantize the block scales to 8 bits as well (double quantization).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype whose memory holds the packed bytes.

    Returns:
        The packed tensor `[(A.numel() + 1) // (2 * quant_storage.itemsize), 1]`, and what decodes it.

    Raises:
        ValueError: an argument outside these.
    """
    packed, state = quant.quantize_4bit(
        A, 64 if blocksize is None else blocksize, quant_type, compress_statistics, quant_storage
    )
    return _deliver(packed, state, out, absmax)


def quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """`quantize_4bit` with quant_type "fp4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8):
    """`quantize_4bit` with quant_type "nf4"."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Decode a packed tensor to `quant_state.shape` and `quant_state.dtype`, or into `out` of that shape.

    `out` may be a view with gaps between its rows, as `workspace[:, :columns]`. Without a `quant_state`, `absmax`
    (float32 scales) and `out` (shape and dtype of the result) are needed, and `blocksize` (64) and `quant_type` count.
    A packed tensor given as a row `[1, bytes]` is decoded transposed.

    Raises:
        ValueError: neither form is complete, the tensors do not fit each other, or `out` has other strides.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit requires both absmax and out when quant_state is not provided")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    result = quant.dequantize_4bit(A, quant_state, out)
    return result.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 else result


def dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """`dequantize_4bit` with quant_type "fp4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None):
    """`dequantize_4bit` with quant_type "nf4"."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize `A` (float32, float16 or bfloat16) to 8-bit codes of its shape.

    Args:
        A: the tensor.
        code: the 256 ascending values to round to; the signed dynamic map if not given.
        absmax: receives the block scales, if given.
        out: receives the codes, if given.
        blocksize: elements per block: a power of two from 64 to 4096, on the CPU also above.
        nested: quantize the block scales to 8 bits as well.

    Raises:
        ValueError: an argument outside these.
    """
    q, state = quant.quantize_blockwise(A, blocksize, code)
    if nested:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quant.quantize_blockwise(state.absmax - state.offset, blocksize)
        state.nested = True
    return _deliver(q, state, out, absmax)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Decode 8-bit codes (uint8) to `quant_state.dtype`, in the shape of the codes.

    Without a `quant_state`, `absmax`, `code` (the signed dynamic map) and `blocksize` count, and the result is float32.

    Raises:
        ValueError: neither a state nor absmax, or the tensors do not fit each other.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise requires either quant_state or absmax")
        code = quant.dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    result = quant.dequantize_blockwise(A, quant_state)
    return result if out is None else out.copy_(result)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A @ W.T` for `A` [..., K] and the packed weight `B` of `state.shape` [N, K]; the transposed flags do nothing.

    Raises:
        ValueError: no state, or the tensors do not fit each other.
    """
    if state is None:
        raise ValueError("gemv_4bit requires the state from quantize_4bit()")
    result = linear_4bit(A, quant.packed_bytes(B), *state.scales(), state.blocksize, state.quant_type, state.shape)
    return result if out is None else out.copy_(result)


def _deliver(q: Tensor, state: QuantState, out: Tensor | None, absmax: Tensor | None) -> tuple[Tensor, QuantState]:
    """Into the caller's tensors, where given."""
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return (q if out is None else out.copy_(q)), state


def get_paged(*shape, dtype=torch.float32, device=torch.device("cuda", index=0)):  # noqa: B008
    """Zeros that leave memory under pressure: a CPU tensor with `is_paged` and `page_deviceid`.

    For a GPU it lies in unified memory that its kernels can use too; for a CPU in a file-backed mapping (see
    $PYQLORA_PAGE_DIR), and page_deviceid is None.
    """
    device = torch.device(device)
    if device.type == "cpu":
        (out,) = paged.paged_zeros([(shape, dtype)])
        out.page_deviceid = None
    else:
        device = torch.device(device.type, device.index or 0)
        out = paged_cuda.get_paged(shape, dtype, device)
        out.page_deviceid = device.index
    out.is_paged = True
    return out


def prefetch_tensor(A: Tensor, to_cpu=False) -> None:
    """Move a tensor of `get_paged` to where it is used next: its GPU, or with `to_cpu` the host; it may take its time.

    On a CPU the operating system is asked to read its pages ahead, or with `to_cpu` to write them to their file.

    Raises:
        ValueError: the tensor is not paged.
    """
    if not getattr(A, "is_paged", False):
        raise ValueError("prefetch_tensor: expected a tensor of get_paged, got one that is not paged")
    index = A.page_deviceid
    paged.prefetch(A, to_cpu, torch.device("cpu") if index is None else torch.device("cuda", index))
