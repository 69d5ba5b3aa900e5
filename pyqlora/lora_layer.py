"""LoraLayer: what stands in the model in place of an adapted layer, which it keeps as `base_layer`.

Parameters are named as in PEFT: `<path>.lora_A.<adapter>.weight` [r, in] and `<path>.lora_B.<adapter>.weight` [out, r];
embeddings hold `lora_embedding_A.<adapter>` [r, rows] and `lora_embedding_B.<adapter>` [dim, r] instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import dense, merging
from pyqlora.config import LoraConfig
from pyqlora.rows import names_of_rows
from pyqlora.variants import Dora, initialise, scaling_factor

# PEFT's name in the file and in memory -> what it holds for each adapter.
PARAMETER_DICTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class LoraLayer(nn.Module):
    """A layer with any number of adapters, some of them active. Subclasses know one kind of base layer."""

    adapter_layer_names = PARAMETER_DICTS
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "use_dora", "lora_bias")
    cast_input_dtype_enabled = True  # see pyqlora.helpers.disable_input_dtype_casting

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float):
        super().__init__()
        self.base_layer = base_layer
        self.fan_in_fan_out = dense.is_transposed(base_layer)
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
        self._active_adapters = [adapter_name]
        self._disable_adapters = False
        self._frozen_by_disabling: list[nn.Parameter] = []
        self._stashed: list[nn.Module] = []  # the quantized base layer while its merged twin stands in for it
        self._dora_factors: dict[str, Tensor] = {}  # by which a merged DoRA adapter has multiplied the weight
        self.tied_to: tuple[LoraLayer] | None = None  # the layer whose factors this one shares; see pyqlora.tying
        self._dora_cache: dict[str, Tensor] = {}  # the norms that DoraCaching keeps
        self.in_features, self.out_features = self.base_features()
        self.update_layer(adapter_name, r, lora_alpha, config)
        self.train(base_layer.training)

    # --- what a subclass defines -------------------------------------------------------------------------------------

    def base_features(self) -> tuple[int, int]:
        """Input and output features of the base layer."""
        raise NotImplementedError

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        """Create A and B of an adapter, on the CPU in float32."""
        raise NotImplementedError

    def initialise(self, name: str, config: LoraConfig) -> None:
        """Give A and B their first values."""
        initialise(self, name, config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapter."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def delta_matrix(self, name: str) -> Tensor:
        """The unscaled update B·A in float32, in the layout of the base weight."""
        a, b = self.factors(name)
        delta = b.float() @ a.float()
        return delta.t() if self.fan_in_fan_out else delta

    def scaled_update(self, name: str) -> Tensor:
        """What the adapter adds to the base weight, in float32."""
        return self.delta_matrix(name) * self.scaling[name]

    def norm_update(self, name: str) -> Tensor:
        """What DoRA's norm adds to the base weight, in float32."""
        return self.scaled_update(name)

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result`, which may be overwritten, with the adapter's plain LoRA update of `x` added."""
        raise NotImplementedError

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

    def update_rows(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """`result` with to every row of the batch the update of its own adapter added."""
        result = result.clone()
        for name in sorted(set(names) & self.adapters()):
            rows = torch.tensor([i for i, row in enumerate(names) if row == name], device=x.device)
            result[rows] = self.update(name, x[rows], result[rows])
        return result

    # --- adapters ----------------------------------------------------------------------------------------------------

    def adapters(self) -> set[str]:
        """Names of the adapters that this layer has."""
        return set(self.r)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **_: Any) -> None:
        """Add an adapter, or make an existing one anew.

        Raises:
            ValueError: a rank that is not positive, or an unknown initialisation.
        """
        if r <= 0:
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
        if self.factors(adapter_name)[0].device.type != "meta":
            self.initialise(adapter_name, config)
        self.move_adapter(adapter_name)
        if config.use_dora:
            Dora.init(self, adapter_name)
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
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, attribute)
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
        for kind in PARAMETER_DICTS:
            for key, held in getattr(self, kind).items():
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
        for kind in PARAMETER_DICTS:
            held = getattr(self, kind)
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

    def train(self, mode: bool = True) -> LoraLayer:
        """As for any module; what DoraCaching has kept is forgotten."""
        self._dora_cache.clear()
        return super().train(mode)

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

    def read_weight(self) -> Tensor | None:
        """A new float32 tensor of that parameter's values; None for a format unknown here."""
        return dense.read(self.get_base_layer())

    def write_weight(self, weight: Tensor) -> None:
        """Replace that parameter's values, rounded or quantized to what it holds."""
        dense.write(self.get_base_layer(), weight)

    def updating(self) -> list[str]:
        """The adapters that a forward pass adds: the active ones that the layer has, unless disabled or merged."""
        return (
            [] if self._disable_adapters or self.merged else [name for name in self._active_adapters if name in self.r]
        )

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
