"""Params4bit: a parameter that quantizes itself when it reaches a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pyqlora.quant import QuantState, quantize_4bit


def _of_state(*path: str) -> property:
    """A field of the quantization state under the parameter's own name, which is how FSDP walks state_dict keys."""

    def get(param: Params4bit) -> Any:
        value = param.quant_state
        for name in path:
            value = getattr(value, name, None)
        if value is None:
            raise AttributeError(f"'Params4bit' object has no attribute {path[-1]!r}: it is not quantized that way")
        return value

    return property(get)


class Params4bit(torch.nn.Parameter):
    """A weight stored in 4 bits: float until it is moved to a device (`.to("cpu")` counts), packed from then on.

    Casts (`.half()`, `.to(torch.bfloat16)`) apply to a float weight; packed bytes they leave as they are.

    Args:
        data: the float weight, or the packed one together with `quant_state` and `bnb_quantized`.
        requires_grad: False for a packed weight, which has no gradient.
        quant_state: what decodes packed data.
        blocksize: elements per scale: 32, 64 (the default), 128 … 4096.
        compress_statistics: quantize the scales too (double quantization).
        quant_type: "fp4" or "nf4".
        quant_storage: dtype whose memory holds the packed bytes; a float type lets FSDP shard them.
        module: the layer that owns the parameter and is told its state on quantization.
        bnb_quantized: `data` is packed already.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        """Wrap `data`; unknown keywords are attributes that loaders carry over from one parameter to the next."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """A parameter from packed data and the entries of a checkpoint that `QuantState.from_dict` reads."""
        state = QuantState.from_dict(quantized_stats, device)
        if module is not None:
            module.quant_state = state
        return cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type,
            data.dtype,
            module,
            bnb_quantized=True,
        )

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2", "absmax")
    nested_blocksize = _of_state("state2", "blocksize")
    nested_quant_map = _of_state("state2", "code")
    nested_dtype = _of_state("state2", "dtype")
    nested_offset = _of_state("offset")

    def _like(self, data: Tensor) -> Params4bit:
        """`data` under this parameter's settings and state."""
        # accelerate's init_empty_weights leaves a "requires_grad" among the attributes
        return type(self)(data, **{**self.__dict__, "requires_grad": self.requires_grad})

    def _quantize(self, device: torch.device | str) -> Params4bit:
        self.data, self.quant_state = quantize_4bit(
            self.data.to(device), self.blocksize, self.quant_type, self.compress_statistics, self.quant_storage
        )
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = self.quant_state
        return self

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`Tensor.to`; to a device other than meta it quantizes a float weight, in place, and returns self."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            dtype = None
        elif device is not None and device.type != "meta":
            return self._quantize(device)
        if device is not None and self.quant_state is not None:
            self.quant_state.to(device)
        return self._like(super().to(device=device, dtype=dtype, non_blocking=non_blocking))

    def cpu(self) -> Params4bit:
        """`.to("cpu")`."""
        return self.to(device="cpu")

    def cuda(self, device: torch.device | int | str | None = None, non_blocking: bool = False) -> Params4bit:
        """`.to("cuda")`, or to the device given."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.data = state.pop("data")
        self.requires_grad = state.pop("requires_grad")
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return Params4bit, (), self.__getstate__()

    def __copy__(self) -> Params4bit:
        return self._like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) not in memo:
            result = self._like(self.data.clone())
            result.quant_state = copy.deepcopy(self.quant_state, memo)
            result.module = memo.get(id(self.module), self.module)  # the copied layer, if it is being copied too
            memo[id(self)] = result
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Pieces, as FSDP cuts them, keep the state; casts keep packed bytes; all else is as on a tensor."""
        if func in _CASTS and args[0].bnb_quantized:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in _CUTS:
            return tuple(args[0]._like(piece) for piece in result)
        return result


_CASTS = (Tensor.half, Tensor.float, Tensor.double, Tensor.bfloat16)
_CUTS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)
