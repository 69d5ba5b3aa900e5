"""LoRA on single parameters (target_parameters), such as the stacked weights of a mixture's experts."""

# ruff: noqa: D102 - LoraModule says what the methods do

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import dense
from pyqlora.config import LoraConfig
from pyqlora.inject import ends_with, pattern_value
from pyqlora.lora_layer import LoraLayer
from pyqlora.lora_module import LoraModule
from pyqlora.rows import served_rows


class ParamWrapper(LoraModule):
    """LoRA on one parameter of the base layer, which runs with W + sBA in its place.

    W is [out, in], or a stack of experts: [experts, out, in], or [experts, in, out] if the base layer says
    `is_transposed`. A is [experts · r, in], an expert's rows together; B is [out, r · experts], an expert's columns
    `experts` apart. Several parameters of a layer are wrapped one around another: the outermost gives the base layer
    the values of all of them.
    """

    def __init__(
        self, base_layer: nn.Module, parameter_name: str, adapter_name: str, config: LoraConfig, r: int, alpha: float
    ):
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, r, alpha)

    def base_features(self) -> tuple[int, int]:
        shape = self.adapted_weight().shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter, but only 2d and "
                "3d are supported."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self.fan_in_fan_out = len(shape) == 3 and bool(getattr(self.get_base_layer(), "is_transposed", False))
        return (shape[-2], shape[-1]) if self.fan_in_fan_out else (shape[-1], shape[-2])

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        for field in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"):
            if (value := getattr(config, field)) and not (field == "lora_dropout" and config.inference_mode):
                raise ValueError(
                    f"lora.{type(self).__name__} does not work with {field}={value}. {self.parameter_name} is adapted "
                    "as a parameter, whose update has no input of its own: leave the setting out, or the parameter "
                    "with exclude_modules."
                )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        self.lora_A[name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    def initialise(self, name: str, config: LoraConfig) -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"Unknown initialization init_lora_weights={config.init_lora_weights!r} for a parameter: expected "
                "True, False or 'gaussian'"
            )
        super().initialise(name, config)

    def adapted_weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def read_weight(self) -> Tensor | None:
        return dense.widened(self.adapted_weight())

    def write_weight(self, weight: Tensor) -> None:
        if self.parameter_name not in self.get_base_layer()._parameters:
            raise ValueError(
                f"merging an adapter of {self.parameter_name}: {type(self.get_base_layer()).__name__} computes this "
                "parameter from others (it is parametrized, as a 4-bit one), which cannot hold the update"
            )
        self.adapted_weight().data = weight.to(self.adapted_weight().dtype, copy=True)

    def stacked_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The left and right factor of the update: [experts, rows, r] and [experts, r, columns] in W's layout."""
        a, b = self.factors(name)
        a = a.view(self.num_experts, -1, self.in_features)
        b = b.view(self.out_features, -1, self.num_experts).permute(2, 0, 1)
        return (a.mT, b.mT) if self.fan_in_fan_out else (b, a)

    def delta_matrix(self, name: str) -> Tensor:
        left, right = self.stacked_factors(name)
        return (left.float() @ right.float()).view(self.adapted_weight().shape)

    def weight_with_updates(self) -> Tensor:
        """The parameter plus the active adapters' updates, each added in one batched product."""
        weight = base = self.adapted_weight()
        if self.updating() and base.device.type == "meta":
            raise RuntimeError(
                f"{self.parameter_name} of {type(self.get_base_layer()).__name__} is offloaded (it lies on the meta "
                "device), and a parameter with an adapter must stay on its device"
            )
        with torch.autocast(base.device.type, enabled=False):
            for name in self.updating():
                left, right = (factor.to(base.dtype) for factor in self.stacked_factors(name))
                stack = weight.view(self.num_experts, *base.shape[-2:])
                weight = torch.baddbmm(stack, left, right, alpha=self.scaling[name]).view(base.shape)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the base layer computes with the active adapters in its parameters."""
        if kwargs.pop("adapter_names", None) is not None or served_rows() is not None:
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")
        values, layer = {}, self
        while isinstance(layer, ParamWrapper):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            if layer.updating():
                values[layer.parameter_name] = layer.weight_with_updates()
            layer = layer.base_layer
        return (dense.with_values(layer, values) if values else layer)(x, *args, **kwargs)

    def __repr__(self) -> str:
        kind, _, rest = super().__repr__().partition("(")
        return f"{kind}(\n  parameter_name='{self.parameter_name}',{rest}"


def find_parameters(config: LoraConfig, model: nn.Module) -> list[str]:
    """Full names of the parameters that target_parameters names, without the ".base_layer" of those wrapped already."""
    adapters = {id(p) for layer in model.modules() if isinstance(layer, LoraLayer) for p in layer.adapter_parameters()}
    found = []
    for path, module in model.named_modules():
        path = path.replace(".base_layer", "")
        for name, parameter in own_parameters(module):
            full_name = f"{path}.{name}" if path else name
            if ends_with(full_name, config.target_parameters or ()) and id(parameter) not in adapters:
                found.append(full_name)
    return found


def own_parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of those that a module holds itself, parametrized ones too."""
    yield from module.named_parameters(recurse=False)
    yield from getattr(module, "parametrizations", {}).items()


def wrap_parameters(model: nn.Module, config: LoraConfig, adapter_name: str) -> list[str]:
    """Give the adapter its LoRA on every parameter that target_parameters names, and return their full names.

    Raises:
        ValueError: a parameter of the model itself or of a layer that has an adapter as a whole.
    """
    found = find_parameters(config, model)
    for full_name in found:
        path, _, name = full_name.rpartition(".")
        if not path:
            raise ValueError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{name}'): its module "
                "has no parent in which an adapter could take its place"
            )
        outer = layer = model.get_submodule(path)
        while isinstance(layer, ParamWrapper) and layer.parameter_name != name:
            layer = layer.base_layer
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            raise ValueError(
                f"Trying to wrap an `nn.Parameter` of layer '{path}' of type {type(layer).__name__}, which is not a "
                "valid target. Make sure that this layer is not also targeted with `target_modules`, which may be set "
                "by the model's type: `target_modules=[]` prevents that."
            )
        r = pattern_value(config.rank_pattern, full_name, config.r)
        alpha = pattern_value(config.alpha_pattern, full_name, config.lora_alpha)
        if isinstance(layer, ParamWrapper):
            layer.update_layer(adapter_name, r, alpha, config)
        else:
            parent, _, child = path.rpartition(".")
            wrapper = ParamWrapper(outer, name, adapter_name, config, r, alpha)
            setattr(model.get_submodule(parent), child, wrapper)
    return found
