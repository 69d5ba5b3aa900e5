"""torch's TransformerEncoderLayer in eval mode: its fused kernel reads the base weights and would skip the adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyqlora.lora_layer import LoraLayer


def _seen(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: torch calls the modules one by one where any of them has a hook."""


def call_layers(model: nn.Module) -> None:
    """Have torch's encoder layers call the adapted layers in them; the others keep the fused kernel."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in module.modules():
                if isinstance(layer, LoraLayer) and _seen not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(_seen)  # goes with the layer when the adapter is unloaded
        elif isinstance(module, nn.TransformerEncoder) and _adapted(module) and module.use_nested_tensor:
            module.use_nested_tensor = False  # padding is packed away for the fused kernel only
            module.nested_without_adapters = True


def restore(model: nn.Module) -> None:
    """Undo `call_layers` in a model whose adapters are gone."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.__dict__.pop("nested_without_adapters", False):
            module.use_nested_tensor = True


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(layer, LoraLayer) for layer in module.modules())
