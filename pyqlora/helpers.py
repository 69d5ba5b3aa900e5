"""Small tools around adapters, under the names that PEFT has for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pyqlora.config import PeftConfig
from pyqlora.lora_layer import LoraLayer
from pyqlora.variants import DoraCaching

__all__ = ["DoraCaching", "check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale"]


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory, or a repository on the hub, holds an adapter that can be read here."""
    try:
        PeftConfig.from_pretrained(str(model_name_or_path))
    except (OSError, TypeError, ValueError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While open, every adapter's update counts `multiplier` times: 0 is the base model, 1 the adapted one.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no adapter.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = {layer: dict(layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)}
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scaling in before.items():
            layer.scaling = {name: scale * multiplier for name, scale in scaling.items()}
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """While open, convolutions hand their input to an adapter as it is, where hooks convert the weights, as diffusers'.

    Linear layers read x and A together and multiply both in one dtype, whatever hooks have made of A: there is nothing
    to switch off in them.
    """
    layers = [layer for layer in model.modules() if active and isinstance(layer, LoraLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled
