"""LoraModule: what pyqlora's own LoRA layers have in common, the base layer's output plus updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import dense, merging
from pyqlora.config import LoraConfig
from pyqlora.lora_layer import LoraLayer
from pyqlora.rows import names_of_rows
from pyqlora.variants import Dora


class LoraModule(LoraLayer, nn.Module):
    """A layer with adapters that runs, merges and has DoRA. Subclasses know one kind of base layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float):
        nn.Module.__init__(self)
        self.fan_in_fan_out = dense.is_transposed(base_layer)
        self._stashed: list[nn.Module] = []  # the quantized base layer while its merged twin stands in for it
        self._dora_factors: dict[str, Tensor] = {}  # by which a merged DoRA adapter has multiplied the weight
        self._dora_cache: dict[str, Tensor] = {}  # the norms that DoraCaching keeps
        LoraLayer.__init__(self, base_layer)
        self._active_adapters = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha, config)
        self.train(base_layer.training)

    # --- the update --------------------------------------------------------------------------------------------------

    def delta_matrix(self, name: str) -> Tensor:
        """The unscaled update B·A in float32, in the layout of the base weight."""
        a, b = self.factors(name)
        delta = b.float() @ a.float()
        return delta.t() if self.fan_in_fan_out else delta

    def scaled_update(self, name: str) -> Tensor:
        """What the adapter adds to the base weight, in float32."""
        return self.delta_matrix(name) * self.scaling[name]

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result`, which may be overwritten, with the adapter's plain LoRA update of `x` added."""
        raise NotImplementedError

    def update_rows(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """`result` with to every row of the batch the update of its own adapter added."""
        result = result.clone()
        for name in sorted(set(names) & self.adapters()):
            rows = torch.tensor([i for i, row in enumerate(names) if row == name], device=x.device)
            result[rows] = self.update(name, x[rows], result[rows])
        return result

    # --- DoRA --------------------------------------------------------------------------------------------------------

    def start_dora(self, name: str) -> None:
        """Give an adapter with use_dora its magnitudes."""
        Dora.init(self, name)

    def norm_update(self, name: str) -> Tensor:
        """What DoRA's norm adds to the base weight, in float32."""
        return self.scaled_update(name)

    def norm_shape(self) -> tuple[int, ...]:
        """The shape of a value for each output feature that broadcasts over the layer's output."""
        return (self.out_features,)

    def feature_rows(self, weight: Tensor) -> Tensor:
        """A weight in the base layer's layout as one row for each output feature."""
        return weight.t() if self.fan_in_fan_out else weight.flatten(1)

    def along_features(self, values: Tensor) -> Tensor:
        """A value for each output feature in a shape that broadcasts over the weight."""
        weight = self.get_base_layer().weight
        return values if self.fan_in_fan_out else values.view(-1, *(1,) * (weight.dim() - 1))

    def train(self, mode: bool = True) -> LoraModule:
        """As for any module; what DoraCaching has kept is forgotten."""
        self._dora_cache.clear()
        return super().train(mode)

    # --- the base weight ---------------------------------------------------------------------------------------------

    def read_weight(self) -> Tensor | None:
        """A new float32 tensor of that parameter's values; None for a format unknown here."""
        return dense.read(self.get_base_layer())

    def write_weight(self, weight: Tensor) -> None:
        """Replace that parameter's values, rounded or quantized to what it holds."""
        dense.write(self.get_base_layer(), weight)

    def weight_with_updates(self) -> Tensor:
        """The adapted weight plus these adapters' updates, for a base layer that reads it: in float32, rounded once."""
        weight = self.adapted_weight()
        with torch.autocast(weight.device.type, enabled=False):
            updates = [self.scaled_update(name) for name in self.updating()]
            return sum(updates, weight.float()).to(weight.dtype) if updates else weight

    def splittable_weight(self, method: str) -> Tensor:
        """The base weight as a float32 [out, in] matrix, for an initialiser that takes a part out of it."""
        weight = self.read_weight()
        if weight is None:
            raise TypeError(f"{method} initialisation needs a float32, float16, bfloat16 or 4-bit base weight")
        return weight.t() if self.fan_in_fan_out else weight

    def set_weight(self, weight: Tensor) -> None:
        """Write a float32 [out, in] matrix to the base layer."""
        self.write_weight(weight.t() if self.fan_in_fan_out else weight)

    # --- merging -----------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's scaled update of the base weight, in the adapter's dtype."""
        return (self.delta_matrix(adapter) * self.scaling[adapter]).to(self.factors(adapter)[0].dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False) -> None:
        """See pyqlora.merging.merge."""
        merging.merge(self, safe_merge, adapter_names, requantize)

    def unmerge(self) -> None:
        """See pyqlora.merging.unmerge."""
        merging.unmerge(self)

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, in the base output's dtype."""
        names = names_of_rows(len(x), kwargs.pop("adapter_names", None))
        if names is not None:
            self._check_rows(names)
        if self._disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if names is not None:
            return result if self._disable_adapters else self.update_rows(names, x, result)
        for name in self.updating():
            update = Dora.update if self.use_dora[name] else type(self).update
            result = update(self, name, x, result)
        return result

    def _check_rows(self, names: list[str]) -> None:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if any(self.use_dora.get(name) for name in names):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")

    def dropout_of(self, name: str) -> float:
        """The probability of the adapter's dropout, 0 outside training."""
        layer = self._modules["lora_dropout"]._modules[name]
        return layer.p if layer.training and isinstance(layer, nn.Dropout) else 0.0

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
