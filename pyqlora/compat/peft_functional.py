"""peft.functional: what transformers and diffusers call on models into which an adapter was injected."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.lora_layer import LoraLayer
from pyqlora.trainable_tokens import TrainableTokensWrapper

Adapted = LoraLayer | ModulesToSaveWrapper | TrainableTokensWrapper


def _adapted(model: nn.Module) -> Iterator[Adapted]:
    return (module for module in model.modules() if isinstance(module, Adapted))


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: type = LoraLayer
) -> None:
    """Use one adapter or several in every layer; train them, and no others, unless `inference_mode`."""
    for module in _adapted(model):
        if getattr(module, "merged", False):
            module.unmerge()
        module.set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type = LoraLayer
) -> list[str] | None:
    """Remove an adapter from every layer; returns the names that are active then."""
    active = None
    for layer in _adapted(model):
        if isinstance(layer, LoraLayer):
            layer.delete_adapter(adapter_name)
            active = layer.active_adapters if active is None else active
    for wrapper in _adapted(model):
        if not isinstance(wrapper, LoraLayer):
            wrapper.delete_adapter(adapter_name, active)
    return active


def set_requires_grad(model: nn.Module, adapter_names: str | list[str], requires_grad: bool = True) -> None:
    """Train or freeze adapters, active or not."""
    for module in _adapted(model):
        module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter's half-precision weights in float32."""
    for module in _adapted(model) if autocast_adapter_dtype else ():
        for parameter in module.adapter_parameters(adapter_name):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
