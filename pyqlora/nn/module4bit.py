"""What layers with a 4-bit weight have in common: finding their quantization state, saving and loading it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyqlora.nn.params4bit import Params4bit
from pyqlora.quant import PACKED_KEY, QuantState


class Module4bit:
    """Mixed into a torch module whose `weight` is a `Params4bit`.

    Its state_dict has the packed weight and, beside it, the entries of the quantization state
    (`weight.absmax`, `weight.quant_map`, …); a state_dict with those entries loads as it is.
    """

    quant_state: QuantState | None = None

    def _state(self) -> QuantState:
        """The weight's quantization state, which a weight that lost it gets back.

        Raises:
            ValueError: the weight is not quantized yet.
        """
        weight = self._parameters["weight"]
        state = getattr(weight, "quant_state", None)
        if state is not None:
            return state
        # FSDP leaves a weight without its state, or a plain parameter in its place: then only the layer knows
        if self.quant_state is None:
            raise ValueError(
                f"{type(self).__name__} is not quantized yet: move it to a device first, e.g. layer.to('cpu')"
            )
        if isinstance(weight, Params4bit):
            weight.quant_state = self.quant_state
        return self.quant_state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        start = f"{prefix}weight."
        entries = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        if any(key.startswith(PACKED_KEY) for key in entries):
            packed = state_dict[f"{prefix}weight"]
            device = packed.device if self.weight.device.type == "meta" else self.weight.device
            self.weight = Params4bit.from_prequantized(packed, entries, device=device, module=self)
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(start)}
            state_dict[f"{prefix}weight"] = self.weight
        super()._load_from_state_dict(state_dict, prefix, *args)
