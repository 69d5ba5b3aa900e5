"""get_layer_status and get_model_status: what is adapted, active, merged and trainable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyqlora import dense
from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.lora_layer import LoraLayer
from pyqlora.model import PeftModel, count_parameters
from pyqlora.trainable_tokens import TrainableTokensWrapper

IRREGULAR = "irregular"  # the value for what differs between layers or parameters


@dataclass
class TunerLayerStatus:
    """One adapted layer; requires_grad and devices are by adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted layers together; "irregular" stands for what is not the same everywhere."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def common(values: Iterable[Any]) -> Any:
    """The value that all have, or "irregular"."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else IRREGULAR


def _layer_status(name: str, module: LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper) -> TunerLayerStatus:
    if isinstance(module, TrainableTokensWrapper):
        name = f"{name}.token_adapter"
    adapters = sorted(module.adapters())
    parameters = {adapter: module.adapter_parameters(adapter) for adapter in adapters}
    parameters = {adapter: held for adapter, held in parameters.items() if held}
    quantized = isinstance(module, LoraLayer) and dense.is_4bit(module.get_base_layer())
    backend = getattr(module, "quantization_backend", "bnb 4bit" if quantized else None)  # an own layer may tell it
    return TunerLayerStatus(
        name=name,
        module_type="TrainableTokensLayer"
        if isinstance(module, TrainableTokensWrapper)
        else repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(getattr(module, "merged_adapters", [])),
        requires_grad={adapter: common(p.requires_grad for p in held) for adapter, held in parameters.items()},
        available_adapters=adapters,
        devices={adapter: sorted({p.device.type for p in held}) for adapter, held in parameters.items()},
        quantization_backend=None if backend is None else str(backend),
    )


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer of a PeftModel, or of a model into which adapters were injected.

    Raises:
        ValueError: there is none.
    """
    root = model.base_model if isinstance(model, PeftModel) else model
    kinds = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    status = [_layer_status(name, module) for name, module in root.named_modules() if isinstance(module, kinds)]
    if not status:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return status


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the model as a whole.

    Raises:
        ValueError: no layer is adapted.
    """
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    half_merged = any((set(layer.available_adapters) - set(layer.merged_adapters)) & set(merged) for layer in layers)
    adapters = sorted({name for layer in layers for name in layer.available_adapters})
    is_peft = isinstance(model, PeftModel)
    is_transformers = hasattr(getattr(model, "config", None), "model_type")
    return TunerModelStatus(
        base_model_type=type(model.get_base_model() if is_peft else model).__name__
        if is_peft or is_transformers
        else "other",
        adapter_model_type=type(model.base_model).__name__ if is_peft else "None",
        peft_types={name: config.peft_type.value for name, config in model.peft_config.items()} if is_peft else {},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=common(layer.enabled for layer in layers),
        active_adapters=common(layer.active_adapters for layer in layers),
        merged_adapters=IRREGULAR if half_merged else merged,
        requires_grad={
            name: common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in adapters
            if any(name in layer.requires_grad for layer in layers)
        },
        available_adapters=adapters,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in adapters
        },
        quantization_backend=common(layer.quantization_backend for layer in layers),
    )
