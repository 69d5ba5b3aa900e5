"""What code written against PEFT's inner modules imports from them, on pyqlora's layers."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import inject, kbit, ties
from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.config import LoraConfig
from pyqlora.dense import is_4bit
from pyqlora.lora_layer import LoraLayer
from pyqlora.model import PeftModel
from pyqlora.trainable_tokens import TrainableTokensWrapper
from pyqlora.tuner import LoraModel


class AuxiliaryTrainingWrapper(abc.ABC):  # noqa: B024 - for isinstance only
    """What trains beside LoRA layers: whole modules and single tokens."""


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)
AuxiliaryTrainingWrapper.register(TrainableTokensWrapper)


class PeftMixedModel(PeftModel):
    """In PEFT a model with adapters of several methods; here they are all LoRA."""


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """`pyqlora.prepare_model_for_kbit_training`, and half-precision parameters as float32, as PEFT has them."""
    model = kbit.prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16) and not is_4bit(module):
                parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def infer_device() -> str:
    """The kind of accelerator that torch sees, or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight as [out, in]."""
    return weight.T if fan_in_fan_out else weight


def check_target_module_exists(config: LoraConfig, key: str) -> bool | inject.Excluded:
    """Whether the config targets the module of that name."""
    return inject.match(config, key)


def inspect_matched_modules(tuner: LoraModel, adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of the modules that an adapter's config targets, and of those it does not."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        found["matched" if inject.match(config, name) else "unmatched"].append(name)
    return found


def _find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string.")
    if common := set(target_modules) & set(other_module_names):
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue: "
            f"{sorted(common)}"
        )
    return inject.minimal_targets(target_modules, other_module_names)


def _maybe_include_all_linear_layers(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == inject.ALL_LINEAR:
        peft_config.target_modules = inject.all_linear_names(peft_config, model)
    return peft_config


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module with a dotted name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Class names of the blocks that lie on one device."""
    return getattr(model, "_no_split_modules", None) or set()


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Where the parameters of LoRA layers are in the state_dict; with a name, only that adapter's."""
    prefixes = set()
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside += (f"{path}.",)
        elif isinstance(module, LoraLayer) and not (inside and path.startswith(inside)):
            held = {name: child for name, child in module.named_children() if name != "base_layer"}
            if adapter_name is not None:
                held = {f"{name}.{adapter_name}": None for name, child in held.items() if adapter_name in child}
            prefixes |= {f"{path}.{name}" if path else name for name in held}
    return prefixes


def _filter_state_dict_by_key_prefixes(state_dict: dict[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """The entries whose dotted key is a prefix or lies below one."""
    under = tuple(f"{prefix}." for prefix in prefixes)
    return {key: value for key, value in state_dict.items() if key in prefixes or (under and key.startswith(under))}


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Names, in the base model, of the modules whose weight is the input embedding's."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return ties.tied_names(base.model if isinstance(base, LoraModel) else base)
