"""LoraLayer: the adapters of one layer of the model, in place of which it stands and which it keeps as `base_layer`.

Parameters are named as in PEFT: `<path>.lora_A.<adapter>.weight` [r, in] and `<path>.lora_B.<adapter>.weight` [out, r];
embeddings hold `lora_embedding_A.<adapter>` [r, rows] and `lora_embedding_B.<adapter>` [dim, r] instead.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pyqlora import dense
from pyqlora.config import LoraConfig
from pyqlora.variants import initialise, scaling_factor

PREFIX = "lora_"  # how the names of the dictionaries start that hold the adapters' parameters


class LoraLayer:
    """Any number of adapters, some of them active, for one layer; a mixin beside nn.Module.

    LoraModule is what pyqlora's own layers are. A program's own layer for another kind of base layer, registered with
    `LoraConfig._register_custom_module`, is written as for PEFT:

        class LoraLSTM(nn.Module, LoraLayer):
            def __init__(self, base_layer, adapter_name, **kwargs):  # config, r, lora_alpha
                super().__init__()
                LoraLayer.__init__(self, base_layer)
                self.update_layer(adapter_name, **kwargs)

    It has a forward, which adds the updates of `updating()`, a `make_factors` where the base layer does not tell its
    in_features and out_features, and merge and unmerge if it is to be merged. Every nn.ModuleDict or nn.ParameterDict
    in it whose name starts with "lora_" belongs to the adapters: it is trained, saved and loaded by their names.

    Args:
        base_layer: the layer to adapt.
    """

    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
    cast_input_dtype_enabled = True  # see pyqlora.helpers.disable_input_dtype_casting

    def __init__(self, base_layer: nn.Module, **_: Any):
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapters: list[str] = []
        self._disable_adapters = False
        self._frozen_by_disabling: list[nn.Parameter] = []
        self.tied_to: tuple[LoraLayer] | None = None  # the layer whose factors this one shares; see pyqlora.tying
        self.in_features, self.out_features = self.base_features()

    # --- what a subclass defines -------------------------------------------------------------------------------------

    def base_features(self) -> tuple[int | None, int | None]:
        """Input and output features of the base layer, None where it does not tell."""
        base = self.get_base_layer()
        return getattr(base, "in_features", None), getattr(base, "out_features", None)

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        """Create A and B of an adapter, on the CPU in float32: here those of a linear layer."""
        if self.in_features is None or self.out_features is None:
            raise NotImplementedError(
                f"{type(self).__name__} needs a make_factors of its own: {type(self.get_base_layer()).__name__}, which "
                "it adapts, does not tell the in_features and out_features of which a linear layer's are made"
            )
        # nn.Linear's own initialisation is overwritten, but it draws random numbers as PEFT does: same seed, same A.
        self.lora_A[name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    def initialise(self, name: str, config: LoraConfig) -> None:
        """Give A and B their first values."""
        initialise(self, name, config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapter."""
        if name not in self.lora_A or name not in self.lora_B:
            raise NotImplementedError(
                f"{type(self).__name__} needs methods `factors` and `initialise` of its own: it does not keep adapter "
                f"{name!r} in lora_A and lora_B"
            )
        return self.lora_A[name].weight, self.lora_B[name].weight

    def delta_matrix(self, name: str) -> Tensor:
        """The unscaled update B·A in float32, in the layout of the base weight."""
        raise NotImplementedError(f"{type(self).__name__} has no `delta_matrix`, its update as one matrix")

    def splittable_weight(self, method: str) -> Tensor:
        """The base weight as a float32 [out, in] matrix, for an initialiser that takes a part out of it."""
        raise TypeError(f"{method} initialisation takes a part out of the base weight: {type(self).__name__} cannot")

    def start_dora(self, name: str) -> None:
        """Give an adapter with use_dora its magnitudes."""
        raise ValueError(f"{type(self).__name__} does not support DoRA, please set use_dora to False")

    # --- adapters ----------------------------------------------------------------------------------------------------

    def parameter_dicts(self) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
        """By their names, the dictionaries that hold parameters of adapters under the adapters' names."""
        dicts = (nn.ModuleDict, nn.ParameterDict)
        return {
            name: held for name, held in self._modules.items() if name.startswith(PREFIX) and isinstance(held, dicts)
        }

    def adapters(self) -> set[str]:
        """Names of the adapters that this layer has."""
        return set(self.r).union(*self.parameter_dicts().values())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **_: Any) -> None:
        """Add an adapter, or make an existing one anew.

        Raises:
            ValueError: a rank that is not positive, or an unknown initialisation.
        """
        if not isinstance(r, numbers.Integral) or r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(self.get_base_layer()).__name__} "
                "has no bias. This means that merging LoRA weights won't be possible.",
                stacklevel=2,
            )
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = scaling_factor(lora_alpha, r, config.use_rslora)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.make_factors(adapter_name, r, config)
        if not any(parameter.is_meta for parameter in self.adapter_parameters(adapter_name)):
            self.initialise(adapter_name, config)
        self.move_adapter(adapter_name)
        if config.use_dora:
            self.start_dora(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_factors(self, name: str, a: Tensor, b: Tensor) -> None:
        """Replace the values of A and B."""
        for parameter, value in zip(self.factors(name), (a, b), strict=True):
            parameter.data = value.to(parameter.dtype).contiguous()

    def move_adapter(self, name: str) -> None:
        """Bring an adapter to the base layer's device, and to its dtype if that is a floating one."""
        weight = self.adapted_weight()
        if weight is None:
            return
        dtype = dense.float_dtype(self.get_base_layer(), weight)
        for parameter in self.adapter_parameters(name):
            if parameter.device.type != "meta":
                parameter.data = parameter.data.to(device=weight.device, dtype=dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first of those left becomes active."""
        for held in (*self.parameter_dicts().values(), *(getattr(self, name) for name in self.other_param_names)):
            if adapter_name in held:
                del held[adapter_name]
        if adapter_name not in self._active_adapters:
            return
        remaining = [name for name in self._active_adapters if name != adapter_name]
        if not remaining and self.adapters():
            remaining = sorted(self.adapters())[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {remaining[0]}.",
                stacklevel=2,
            )
        self.set_adapter(remaining)

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The parameters of one adapter, or of all."""
        found = []
        for kind in self.parameter_dicts().values():
            for key, held in kind.items():
                if name in (None, key):
                    found += [held] if isinstance(held, Tensor) else held.parameters()
        return found

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use, also such as this layer does not have."""
        return self._active_adapters

    @property
    def active_adapter(self) -> list[str]:
        """As active_adapters."""
        return self._active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer runs as the bare base layer."""
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether the base weight holds any adapter's update."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use these adapters; train them, and no others, unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapters = names
        for name in self.adapters():
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for held in self.parameter_dicts().values():
            for name in names & set(held):
                held[name].requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Run with the active adapters, or as the bare base layer; adapters are frozen while they are disabled."""
        if enabled:
            for parameter in self._frozen_by_disabling:
                parameter.requires_grad_(True)
            self._frozen_by_disabling.clear()
        elif not self._disable_adapters:
            self._frozen_by_disabling = [p for p in self.adapter_parameters() if p.requires_grad]
            self.set_requires_grad(self.adapters(), False)
        self._disable_adapters = not enabled

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its configured one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * scaling_factor(
                self.lora_alpha[adapter], self.r[adapter], self.use_rslora[adapter]
            )

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.adapters() & set(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or without an argument return it to the configured value."""
        for name in self.adapters() & set(self.active_adapters):
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    # --- the base layer ----------------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped layer."""
        layer = self.base_layer
        while isinstance(layer, LoraLayer):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.get_base_layer().bias

    def adapted_weight(self) -> Tensor | None:
        """The parameter that adapters update, as the base layer holds it; None if it holds none."""
        return getattr(self.get_base_layer(), "weight", None)

    def updating(self) -> list[str]:
        """The adapters that a forward pass adds: the active ones that the layer has, unless disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self._active_adapters if name in self.r]

    # --- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False) -> None:
        """Add the updates of adapters (default: the active ones) to the base weight; see pyqlora.merging.merge."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: it has no merge of its own")

    def unmerge(self) -> None:
        """Take all merged updates out of the base weight again."""
        raise NotImplementedError(f"{type(self).__name__} cannot be unmerged: it has no unmerge of its own")
