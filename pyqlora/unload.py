"""The plain model again: every LoRA layer and wrapper replaced by what it stands for, merged or as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from pyqlora import dense
from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.encoder import restore
from pyqlora.lora_layer import LoraLayer
from pyqlora.trainable_tokens import TrainableTokensWrapper
from pyqlora.tying import tie_again


def unload(
    model: nn.Module,
    merge: bool,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    requantize: bool = False,
) -> nn.Module:
    """Take all adapters out of a model, in place; arguments as in LoraModel.merge_and_unload."""
    kinds = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    names.reverse()  # the innermost first: LoRA layers may hold others
    for name in _progress(names, progressbar, "Unloading and merging model" if merge else "Unloading model"):
        module = model.get_submodule(name)
        if isinstance(module, LoraLayer):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names, requantize=requantize)
            left = module.get_base_layer()
        else:
            left = module.unloaded(merge, adapter_names)
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, left)
    restore(model)
    if merge:
        tie_again(layers)
    if merge and not requantize:
        dense.dequantize_model(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    if merge:
        _untie_config(model)
    return model


def untie(model: nn.Module) -> None:
    """Give adapted layers that share their weight with another module one of their own, for merging to change."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    sharing = {id(other) for layer in layers if layer.tied_to is not None for other in (layer, *layer.tied_to)}
    for layer in layers:
        base = layer.get_base_layer()
        shared = names.get(id(getattr(base, "weight", None)), [])
        if len(shared) < 2 or dense.is_4bit(base):
            continue
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        if id(layer) not in sharing:
            warnings.warn(
                f"{' and '.join(shared)} are tied and only one of them is adapted: merging unties them, the model "
                "is to be saved and loaded with tie_word_embeddings=False",
                stacklevel=3,
            )


def _untie_config(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(layer, "weight", None) for layer in layers]
    if None not in weights and weights[0].data_ptr() != weights[1].data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. "
            "Setting `tie_word_embeddings=False` in the model config.",
            stacklevel=4,
        )


def _progress(names: list[str], show: bool, label: str) -> Iterator[str]:
    for i, name in enumerate(names):
        yield name
        if show:
            print(f"\r{label}: {i + 1}/{len(names)}", end="" if i + 1 < len(names) else "\n", flush=True)
