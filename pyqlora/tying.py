"""ensure_weight_tying: layers that share a weight with the input embedding share its adapter too.

The adapter is the embedding's. A tied head reads the same factors transposed, so that one parameter gets the gradients
of both and merging leaves both weights equal.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from pyqlora.config import LoraConfig
from pyqlora.inject import ALL_LINEAR, ends_with, match
from pyqlora.kinds import make_layer
from pyqlora.layers import Embedding, Linear
from pyqlora.lora_layer import LoraLayer
from pyqlora.ties import tied_group


class Ties:
    """What an adapter's config asks of a model's tied layers.

    Attributes:
        targets: the tied layers, the embedding first, if LoRA is to adapt all of them as one; else empty.
        saved: the same for modules_to_save.
    """

    def __init__(self, config: LoraConfig, model: nn.Module):
        group = tied_group(model)
        everything = config.target_modules == ALL_LINEAR
        targeted = [] if everything else [name for name in group if match(config, name)]
        saved = [name for name in group if ends_with(name, config.modules_to_save or ())]
        ensure = config.ensure_weight_tying
        self.targets = group if ensure and targeted else []
        self.saved = group if ensure and saved else []
        if ensure and not group and config.trainable_token_indices is None:
            _warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
        elif ensure and not (targeted or saved) and config.trainable_token_indices is None:
            _warn(
                "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` "
                "or `target_modules`"
            )
        elif group and not ensure and (targeted or saved):
            _warn(
                f"{' and '.join(group)} have tied weights and {' and '.join(targeted or saved)} gets an adapter of its "
                "own, but `ensure_weight_tying` is not set to True: the layers will compute with different weights, "
                "and merging unties them"
            )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=7)


class TiedFactor(nn.Module):
    """Stands where a factor of a tied layer would be: a factor of the source, transposed. It has no parameter."""

    bias = None

    def __init__(self, source: Embedding, held: str, name: str):
        super().__init__()
        self._source = (source, held, name)  # in a tuple: not to be registered a second time

    @property
    def weight(self) -> Tensor:
        """The source's factor, transposed."""
        source, held, name = self._source
        return getattr(source, held)[name].t()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the source has a key of its own."""


def tie_layers(
    model: nn.Module, names: list[str], adapter_name: str, config: LoraConfig, r: int, lora_alpha: float
) -> None:
    """Give the layers after the first, which has the adapter, LoRA layers that share its factors."""
    source = model.get_submodule(names[0])
    for name in names[1:]:
        layer = model.get_submodule(name)
        if layer is source:
            continue
        if isinstance(layer, LoraLayer):
            layer.update_layer(adapter_name, r, lora_alpha, config)
        else:
            layer = make_layer(layer, adapter_name, config, r, lora_alpha)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        if isinstance(layer, Embedding):
            for held in ("lora_embedding_A", "lora_embedding_B"):
                getattr(layer, held)[adapter_name] = getattr(source, held)[adapter_name]
        elif isinstance(layer, Linear):
            layer.lora_A[adapter_name] = TiedFactor(source, "lora_embedding_B", adapter_name)
            layer.lora_B[adapter_name] = TiedFactor(source, "lora_embedding_A", adapter_name)
        layer.tied_to = (source,)


def tie_again(layers: list[LoraLayer]) -> None:
    """Let merged layers that share their adapter share their weight as well, which was untied for merging."""
    for layer in layers:
        if layer.tied_to is not None:
            layer.get_base_layer().weight = layer.tied_to[0].get_base_layer().weight
