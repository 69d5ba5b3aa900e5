"""Updates in the base weight: merged in, taken out again, one layer at a time."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyqlora import dense
from pyqlora.variants import Dora

if TYPE_CHECKING:
    from pyqlora.lora_module import LoraModule


@torch.no_grad()
def merge(
    layer: LoraModule, safe_merge: bool = False, adapter_names: list[str] | None = None, requantize: bool = False
) -> None:
    """Add updates to the base weight: computed in float32, rounded once.

    A 4-bit base layer becomes a plain one of its original dtype, or a 4-bit one again with `requantize`; either way
    `unmerge` brings back the very bytes it had.

    Args:
        layer: whose base weight to change.
        safe_merge: refuse a result that is not finite.
        adapter_names: the adapters; None for the active ones.
        requantize: see above.

    Raises:
        ValueError: with safe_merge, infinities or NaN.
        RuntimeError: the adapter has a bias and the base layer none.
    """
    names = [name for name in names_to_merge(layer, adapter_names) if name in layer.adapters()]
    if not names:
        return
    base = layer.get_base_layer()
    original = weight = layer.read_weight()
    bias = None if getattr(base, "bias", None) is None else base.bias.float()
    for name in names:
        weight = weight + layer.scaled_update(name)
        if layer.use_dora[name]:
            layer._dora_factors[name] = Dora.factor(layer, name, unmerged_weight(layer, original))
            weight = weight * layer.along_features(layer._dora_factors[name])
        if layer.lora_bias[name]:
            if bias is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
            bias = bias + layer.lora_B[name].bias.float() * layer.scaling[name]
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
    if dense.is_4bit(base):
        layer._stashed.append(base)
        merged = dense.requantized(base, weight) if requantize else dense.plain_linear(base, weight)
        replace_base(layer, merged)
        base = merged
    else:
        layer.write_weight(weight)
    if bias is not None:
        base.bias.data = bias.to(base.bias.dtype)
    layer.merged_adapters += names


@torch.no_grad()
def unmerge(layer: LoraModule) -> None:
    """Take all merged updates out of the base weight again; exact for a 4-bit base, up to rounding else."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    if layer._stashed:
        replace_base(layer, layer._stashed[0])
        layer._stashed.clear()
        layer.merged_adapters.clear()
        return
    base = layer.get_base_layer()
    layer.write_weight(unmerged_weight(layer, layer.read_weight()))
    for name in layer.merged_adapters:
        if layer.lora_bias[name]:
            base.bias.data -= (layer.lora_B[name].bias * layer.scaling[name]).to(base.bias.dtype)
    layer.merged_adapters.clear()


def unmerged_weight(layer: LoraModule, weight: Tensor) -> Tensor:
    """The base weight, of which `weight` are the present values, without any merged adapter."""
    if layer._stashed:
        return dense.read(layer._stashed[0])
    for name in reversed(layer.merged_adapters):
        if layer.use_dora[name]:
            weight = weight / layer.along_features(layer._dora_factors[name])
        weight = weight - layer.scaled_update(name)
    return weight


def replace_base(layer: LoraModule, base: nn.Module) -> None:
    """Put another innermost layer into a LoRA layer."""
    while layer.base_layer is not layer.get_base_layer():
        layer = layer.base_layer
    layer.base_layer = base


def names_to_merge(layer: LoraModule, adapter_names: list[str] | None) -> list[str]:
    """Those of the adapters (None: the active ones) that are not merged yet.

    Raises:
        TypeError: a single name in place of a list.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = layer.active_adapters if adapter_names is None else adapter_names
    new = [name for name in names if name not in layer.merged_adapters]
    if layer.merged and new:
        warnings.warn(
            f"Already following adapters were merged {','.join(layer.merged_adapters)}. "
            f"You are now additionally merging {','.join(new)}.",
            stacklevel=4,
        )
    elif layer.merged:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
    return new
