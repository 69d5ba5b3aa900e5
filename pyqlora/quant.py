"""Quantized tensors with what decodes them: `QuantState`, and quantization to and from it.

A 4-bit tensor is a packed tensor beside a `QuantState`. The packed tensor holds two codes a byte, the earlier element
in the high nibble, as `[(n + 1) // (2 * itemsize), 1]` of the storage dtype. Under double quantization the block
scales (float32) are themselves 8-bit codes: `scale[i] = code2[absmax[i]] * absmax2[i // 256] + offset`.
(Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314)
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from pyqlora.ops import quantize as ops
from pyqlora.quant_maps import create_dynamic_map

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("fp4", "nf4")
NESTED_BLOCKSIZE = 256
PACKED_KEY = "quant_state.bitsandbytes__"

# Made at import, on the CPU, whatever device or fake-tensor mode is in force when a state needs one.
with torch.device("cpu"):
    _DYNAMIC = create_dynamic_map()
    _CODES = {
        "nf4": torch.tensor(
            [
                -1.0,
                -0.6961928009986877,
                -0.5250730514526367,
                -0.39491748809814453,
                -0.28444138169288635,
                -0.18477343022823334,
                -0.09105003625154495,
                0.0,
                0.07958029955625534,
                0.16093020141124725,
                0.24611230194568634,
                0.33791524171829224,
                0.44070982933044434,
                0.5626170039176941,
                0.7229568362236023,
                1.0,
            ]
        ),
        "fp4": torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]).div(12),
    }


def code_table(quant_type: str, device: torch.device | str) -> Tensor:
    """The 16 values (float32) of a 4-bit type, by code."""
    return _CODES[quant_type].to(device)


def dynamic_map(device: torch.device | str) -> Tensor:
    """The signed 8-bit dynamic map (float32 [256]): the default of blockwise quantization and of nested scales."""
    return _DYNAMIC.to(device)


class QuantState:
    """What decodes a quantized tensor; fields and dictionary form are those of bitsandbytes.

    Args:
        absmax: block scales: float32, or uint8 codes when `state2` is given.
        shape: shape of the original tensor; None for 8-bit blockwise codes, which keep it themselves.
        code: the values of the codes: float32 [16], or [256] for 8-bit.
        blocksize: elements that share one scale.
        quant_type: "nf4", "fp4", or None for 8-bit.
        dtype: dtype of the original tensor, and the one it is decoded to.
        offset: mean of the block scales, subtracted before they were quantized (float32, one element).
        state2: the state of the quantized block scales.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # FSDP walks the dotted keys of a state_dict by getattr, "weight.quant_state.bitsandbytes__nf4" among them.
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.quant_type}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
        """(absmax, nested_absmax, nested_code, offset, nested_blocksize), as `pyqlora.ops` takes them."""
        if (nested := self.state2) is None:
            return self.absmax, None, None, None, NESTED_BLOCKSIZE
        return self.absmax, nested.absmax, nested.code, self.offset, nested.blocksize

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dictionary, by the names of a bitsandbytes checkpoint.

        With `packed`, tensors only: everything else is one JSON text in the uint8 tensor
        `quant_state.bitsandbytes__<quant_type>`, which is what safetensors can hold. Code tables are copied, since
        safetensors refuses tensors that share memory.
        """
        fields = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code.clone(),
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            fields |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return fields
        tensors = {k: v for k, v in fields.items() if isinstance(v, Tensor)}
        text = json.dumps({k: v for k, v in fields.items() if k not in tensors})
        tensors[PACKED_KEY + self.quant_type] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """The inverse of `as_dict`, packed or not; the keys may carry a prefix, which ends at the last dot.

        Raises:
            ValueError: the JSON tensor is missing, doubled or unreadable, or a field is missing or unknown.
        """
        fields = _unpack(qs_dict)
        unknown = fields.keys() - _FIELDS - _NESTED_FIELDS
        missing = (_FIELDS | (_NESTED_FIELDS if "nested_absmax" in fields else set())) - fields.keys()
        if unknown or missing:
            raise ValueError(f"QuantState.from_dict: unknown fields {sorted(unknown)}, missing {sorted(missing)}")
        offset = state2 = None
        if "nested_absmax" in fields:
            offset = torch.tensor(float(fields["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=fields["nested_absmax"].to(device),
                blocksize=fields["nested_blocksize"],
                code=fields["nested_quant_map"].to(device),
                dtype=_dtype(fields["nested_dtype"]),
            )
        return cls(
            absmax=fields["absmax"].to(device),
            shape=None if fields["shape"] is None else torch.Size(fields["shape"]),
            code=fields["quant_map"].to(device),
            blocksize=fields["blocksize"],
            quant_type=fields["quant_type"],
            dtype=_dtype(fields["dtype"]),
            offset=offset,
            state2=state2,
        )

    def to(self, device: torch.device | str) -> None:
        """Move every tensor of the state to `device`, in place."""
        self.absmax = self.absmax.to(device)
        self.code = self.code.to(device)
        if self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            (self.shape, self.dtype, self.blocksize, self.quant_type)
            == (other.shape, other.dtype, other.blocksize, other.quant_type)
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None


_FIELDS = {"quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"}
_NESTED_FIELDS = {"nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"}


def _unpack(qs_dict: dict[str, Any]) -> dict[str, Any]:
    """Fields by their bare names, those of the JSON tensor among them."""
    fields = {key.rpartition(".")[2]: value for key, value in qs_dict.items()}
    packed = [key for key in fields if key.startswith("bitsandbytes__")]
    if "quant_type" not in fields:
        if len(packed) != 1 or packed[0].rpartition("__")[2] not in QUANT_TYPES:
            raise ValueError(
                f"QuantState.from_dict: expected one tensor named {PACKED_KEY}nf4 or {PACKED_KEY}fp4, "
                f"got {packed or sorted(fields)}"
            )
        text = bytes(fields.pop(packed[0]).cpu().numpy())
        try:
            fields |= json.loads(text)
        except ValueError as error:
            raise ValueError(f"QuantState.from_dict: {packed[0]} does not hold JSON: {text[:60]!r}") from error
    return fields


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"QuantState.from_dict: {name!r} is not a dtype of torch")
    return dtype


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=1e-6)


def _check(op: str, blocksize: int, quant_type: str | None, dtype: torch.dtype) -> None:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"{op}: blocksize must be one of {BLOCK_SIZES}, got invalid blocksize {blocksize}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{op}: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if dtype not in FLOATS:
        raise ValueError(f"{op}: only 16/32-bit floats (float32, float16, bfloat16) are supported, got {dtype}")


def pack_4bit(x: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """The packed tensor and the float32 block scales alone, from tensor operators alone; see `quantize_4bit`."""
    _check("quantize_4bit", blocksize, quant_type, x.dtype)
    packed, absmax = torch.ops.pyqlora.quantize_4bit(x, blocksize, quant_type)
    if quant_storage == torch.uint8:
        return packed, absmax
    if packed.shape[0] % quant_storage.itemsize:
        raise ValueError(
            f"quantize_4bit: {packed.shape[0]} packed bytes do not fill whole elements of "
            f"quant_storage {quant_storage}; use torch.uint8"
        )
    return packed.view(-1).view(quant_storage).view(-1, 1), absmax


def quantize_4bit(
    x: Tensor, blocksize: int, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype = torch.uint8
) -> tuple[Tensor, QuantState]:
    """Quantize a float32, float16 or bfloat16 tensor of any shape to 4 bits, by blocks of its flattened elements.

    Args:
        x: the tensor.
        blocksize: elements per block: a power of two from 32 to 4096.
        quant_type: "nf4" or "fp4".
        compress_statistics: quantize the block scales as well (double quantization).
        quant_storage: dtype whose memory holds the packed bytes.

    Raises:
        ValueError: an argument outside these, or bytes that do not fill whole elements of `quant_storage`.
    """
    packed, absmax = pack_4bit(x, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, NESTED_BLOCKSIZE)
    code = code_table(quant_type, x.device)
    return packed, QuantState(absmax, x.shape, code, blocksize, quant_type, x.dtype, offset, state2)


def dequantize_4bit(packed: Tensor, state: QuantState, out: Tensor | None = None) -> Tensor:
    """Decode a packed tensor to `state.shape` and `state.dtype`, or into `out` of that shape, which may have
    gaps between its rows, as `workspace[:, :columns]`.

    Raises:
        ValueError: `packed` or `out` does not fit the state.
    """
    _check("dequantize_4bit", state.blocksize, state.quant_type, state.dtype if out is None else out.dtype)
    packed = packed_bytes(packed)
    if out is None:
        shape = list(state.shape)
        return torch.ops.pyqlora.dequantize_4bit(
            packed, *state.scales(), state.blocksize, state.quant_type, shape, state.dtype
        )
    if out.shape != state.shape:
        raise ValueError(f"dequantize_4bit: out must have shape {tuple(state.shape)}, got {tuple(out.shape)}")
    return ops.dequantize_4bit_into(
        out, packed, *state.scales(), state.blocksize, state.quant_type, math.prod(state.shape)
    )


def packed_bytes(packed: Tensor) -> Tensor:
    """A packed tensor of any storage dtype as uint8, without a copy."""
    return packed if packed.dtype == torch.uint8 else packed.view(-1).view(torch.uint8)


def quantize_blockwise(x: Tensor, blocksize: int, code: Tensor | None = None) -> tuple[Tensor, QuantState]:
    """Quantize a float tensor to 8-bit codes (uint8, its shape) on `code` (float32 [256]; the dynamic map if None)."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"quantize_blockwise: only 16/32-bit floats (float32, float16, bfloat16) are supported, got {x.dtype}"
        )
    code = dynamic_map(x.device) if code is None else code.to(x.device)
    q, absmax = torch.ops.pyqlora.quantize_blockwise(x, code, blocksize)
    return q, QuantState(absmax, code=code, blocksize=blocksize, dtype=x.dtype)


def dequantize_blockwise(q: Tensor, state: QuantState) -> Tensor:
    """Decode 8-bit codes to `state.dtype`, in the shape of the codes."""
    if q.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise: codes must be uint8, got {q.dtype}")
    absmax = state.absmax
    if state.state2 is not None:
        absmax = (dequantize_blockwise(absmax, state.state2) + state.offset).float()
    return torch.ops.pyqlora.dequantize_blockwise(q, state.code.to(q.device), absmax, state.blocksize, state.dtype)
