"""Which LoRA layer a module of the base model gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from pyqlora import dense
from pyqlora.attention import MultiheadAttention
from pyqlora.config import LoraConfig
from pyqlora.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear
from pyqlora.lora_layer import LoraLayer
from pyqlora.lora_module import LoraModule


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" adapts the module."""
    return isinstance(module, nn.Linear) or dense.is_transposed(module)


LAYERS: list[tuple[Callable[[nn.Module], bool], type[LoraModule]]] = [
    (is_linear, Linear),
    (lambda module: isinstance(module, nn.Embedding), Embedding),
    (lambda module: isinstance(module, nn.Conv1d), Conv1d),
    (lambda module: isinstance(module, nn.Conv2d), Conv2d),
    (lambda module: isinstance(module, nn.Conv3d), Conv3d),
    (lambda module: isinstance(module, nn.MultiheadAttention), MultiheadAttention),
]


def make_layer(target: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float) -> LoraLayer:
    """The LoRA layer for a module of the base model; what `_register_custom_module` has named goes first.

    Raises:
        ValueError: a kind of module without one.
        TypeError: a class named there is no nn.Module or no LoraLayer.
    """
    known = next((kind for fits, kind in LAYERS if fits(target)), None)
    own = next((layer for kind, layer in config._custom_modules.items() if isinstance(target, kind)), None)
    if own is not None and not (issubclass(own, nn.Module) and issubclass(own, LoraLayer)):
        raise TypeError(
            f"_register_custom_module: {own.__name__}, named for {type(target).__name__}, must inherit from nn.Module "
            "and from LoraLayer (pyqlora.lora_layer)"
        )
    if own is not None and known is None:
        warnings.warn(f"Unsupported layer type '{type(target)}' encountered, proceed at your own risk.", stacklevel=5)
    if known is not None:
        check_orientation(config, target)
    if own is None and known is None:
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Linear`, `pyqlora.nn.Linear4bit`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
            "`torch.nn.Conv3d`, `torch.nn.MultiheadAttention`, `transformers.pytorch_utils.Conv1D`."
        )
    return (own or known)(target, adapter_name, config=config, r=r, lora_alpha=lora_alpha)


def check_orientation(config: LoraConfig, target: nn.Module) -> None:
    """Correct a fan_in_fan_out that does not fit the module, with a warning."""
    transposed = dense.is_transposed(target)
    if config.fan_in_fan_out != transposed and is_linear(target):
        kind = "a transformers Conv1D" if transposed else "`torch.nn.Linear`"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is {kind}. "
            f"Setting fan_in_fan_out to {transposed}.",
            stacklevel=3,
        )
        config.fan_in_fan_out = transposed
