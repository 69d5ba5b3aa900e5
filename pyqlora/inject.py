"""Which modules of a model a LoraConfig selects."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable

from torch import nn

from pyqlora.config import LoraConfig, TaskType

# The layers PEFT adapts when target_modules is None, by config.model_type.
_TARGETS_AND_MODEL_TYPES = [
    (["q", "v"], "t5 mt5"),
    (["q_proj", "v_proj"], "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text"),
    (["q_proj", "v_proj"], "qwen2 qwen3"),
    (["c_attn"], "gpt2 gpt_bigcode"),
    (["query_key_value"], "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon"),
    (["q", "v", "q_proj", "v_proj"], "blip-2"),
    (["query", "value"], "bert roberta xlm-roberta electra layoutlm"),
    (["query_proj", "value_proj"], "deberta-v2"),
    (["in_proj"], "deberta"),
    (["Wqkv"], "mpt"),
    (["c_proj", "c_attn"], "btlm"),
    (["qkv_proj"], "codegen"),
    (["q_proj", "v_proj", "fc1", "fc2"], "phi"),
    (r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
    (["key", "value", "receptance", "output"], "rwkv"),
    (["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "rwkv7"),
]
DEFAULT_TARGETS = {name: targets for targets, names in _TARGETS_AND_MODEL_TYPES for name in names.split()}

ALL_LINEAR = "all-linear"
CONDENSE_FROM = 20  # this many target names are worth condensing, as in PEFT: matching is quicker, the file shorter
CLASSIFIER_HEADS = ("score", "classifier")


class PeftError(Exception):
    """What the errors of adapting a model have in common."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The config selects no module of the model."""


class Excluded:
    """The answer of `match` for a module that exclude_modules or modules_to_save keep away; false like no match."""

    def __bool__(self) -> bool:
        return False


EXCLUDED = Excluded()


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Whether a dotted name equals one of the suffixes or ends in it after a dot."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def match(config: LoraConfig, name: str) -> bool | Excluded:
    """Whether the config targets the module of that full name; EXCLUDED if it is kept away explicitly."""
    if config.exclude_modules:
        if isinstance(config.exclude_modules, str):
            if re.fullmatch(config.exclude_modules, name):
                return EXCLUDED
        elif ends_with(name, config.exclude_modules):
            return EXCLUDED
    # An adapter inside a module that is trained whole would be trained and saved twice.
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save or ()):
        return EXCLUDED
    if config.target_modules is None:
        return False
    if isinstance(config.target_modules, str):
        return re.fullmatch(config.target_modules, name) is not None
    if name in config.target_modules:
        return True
    return ends_with(name, config.target_modules) and _in_chosen_layer(config, name)


def _in_chosen_layer(config: LoraConfig, name: str) -> bool:
    """Whether layers_to_transform holds the index of the layer: the first number in the name, or after a pattern."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        prefix = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
        if found := re.match(rf"{prefix}{pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def pattern_value(patterns: dict, name: str, default):
    """The value of the first key of rank_pattern or alpha_pattern that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def model_config(model: nn.Module) -> dict:
    """The model's own config as a dict; {"model_type": "custom"} for a plain torch module."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config):
        return dataclasses.asdict(config)
    return config if isinstance(config, dict) else {"model_type": "custom"}


def resolve_targets(config: LoraConfig, model: nn.Module) -> None:
    """Fill in target_modules where it is None (by model type) or "all-linear" (the names of all linear layers).

    Raises:
        ValueError: nothing to target is named and the model type is unknown.
    """
    if config.target_modules is None:
        model_type = model_config(model).get("model_type")
        if model_type not in DEFAULT_TARGETS:
            if config.target_parameters:
                return
            raise ValueError(
                f"Please specify `target_modules` or `target_parameters` in the config: there is no default for "
                f"model type {model_type!r}; target_modules='{ALL_LINEAR}' adapts every linear layer"
            )
        targets = DEFAULT_TARGETS[model_type]
        config.target_modules = targets if isinstance(targets, str) else set(targets)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = all_linear_names(config, model)
    if isinstance(config.target_modules, set) and len(config.target_modules) >= CONDENSE_FROM:
        others = [name for name, _ in model.named_modules() if name and not match(config, name)]
        config.target_modules = minimal_targets(config.target_modules, others)


def minimal_targets(targets: Iterable[str], others: Iterable[str]) -> set[str]:
    """The shortest endings of the names in `targets` that no name in `others` has: few, where targets are many."""

    def endings(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = {ending for name in others for ending in endings(name)}
    chosen: set[str] = set()
    for name in sorted(targets, key=endings):
        if not chosen & set(endings(name)):
            chosen.add(next((ending for ending in endings(name) if ending not in taken), name))
    return chosen


def all_linear_names(config: LoraConfig, model: nn.Module) -> set[str]:
    """Full names of all linear layers, also those that carry an adapter already, but not of the output head."""
    from pyqlora.kinds import is_linear
    from pyqlora.lora_layer import LoraLayer

    heads = []
    if hasattr(model, "get_output_embeddings"):
        heads = [model.get_output_embeddings()]
        if heads == [None] and config.task_type == TaskType.SEQ_CLS:
            heads = [getattr(model, name, None) for name in CLASSIFIER_HEADS]
    names, inside = set(), ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, LoraLayer):
            inside += (name + ".",)
            module_to_check = module.get_base_layer()
        else:
            module_to_check = module
        if is_linear(module_to_check) and not any(module is head for head in heads):
            names.add(name)
    return names


def no_match_error(config: LoraConfig, model: nn.Module, excluded: bool, missed: bool) -> NoMatchingPeftModuleError:
    """The error for a config that selected nothing, with the nearest names that the model does have."""
    if excluded and not missed:
        return NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not excluded and not config.target_modules:
        return NoMatchingPeftModuleError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
    shown = sorted(config.target_modules) if isinstance(config.target_modules, set) else config.target_modules
    if excluded:
        text = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. "
            "You may also have only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    else:
        text = f"Target modules {shown} not found in the base model. Please check the target modules and try again."
    if config.layers_to_transform is not None:
        text += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if config.layers_pattern is not None:
        text += f" You also specified 'layers_pattern': {config.layers_pattern}."
    if isinstance(config.target_modules, str):
        wanted = re.findall(r"[A-Za-z_]\w+", config.target_modules)
    else:
        wanted = sorted(config.target_modules or ())
    return NoMatchingPeftModuleError(text + nearest_names(wanted, model))


def nearest_names(wanted: list[str], model: nn.Module) -> str:
    """A sentence with the layer names that are spelt most like those, e.g. " Nearest names: q_proj, v_proj." """
    names = {name.rpartition(".")[2]: name for name, module in model.named_modules() if not any(module.children())}
    names = {last: full for last, full in names.items() if last and not last.isdigit()}
    words = [name.rpartition(".")[2] for name in wanted]
    near = [name for word in words for name in difflib.get_close_matches(word, names, n=3, cutoff=0.5)]
    near = list(dict.fromkeys(near)) or sorted(names)
    shown = ", ".join(near[:8]) + (", …" if len(near) > 8 else "")
    return f" Nearest names: {shown}; e.g. {names[near[0]]}." if near else ""
