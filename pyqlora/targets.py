"""The modules of a model that get an adapter, and what is said about those that do not."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.config import LoraConfig
from pyqlora.inject import (
    CLASSIFIER_HEADS,
    DEFAULT_TARGETS,
    EXCLUDED,
    ends_with,
    match,
    model_config,
    nearest_names,
    pattern_value,
)
from pyqlora.lora_layer import PREFIX, LoraLayer
from pyqlora.trainable_tokens import TrainableTokensWrapper

COMPILED = "_orig_mod."  # how names in a torch.compile wrapper start
STACKS = ("gate_up_proj", "down_proj")  # all experts' weights in one parameter, as transformers 5 has them
TASK_HEADS = {*CLASSIFIER_HEADS, "qa_outputs"}  # what models with a task save, by whichever of these names they have it
Wrapper = ModulesToSaveWrapper | TrainableTokensWrapper
Adapted = LoraLayer | Wrapper


def find_targets(
    config: LoraConfig, model: nn.Module, state_dict: dict[str, Tensor] | None, tied: list[str]
) -> tuple[list[tuple[str, nn.Module]], bool, bool]:
    """(name, module) of what to adapt, and whether any was excluded and any not targeted.

    Layers that are adapted already are not looked into. Of `tied` layers only the first is chosen: it has the adapter.
    """
    stored = None
    if state_dict is not None and config.target_parameters:
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This "
            "is not supported -- when using `target_parameters`, please inject the adapter without the state_dict."
        )
    if state_dict is not None:
        stored = {key.rsplit(f".{PREFIX}", 1)[0].removeprefix(COMPILED) for key in state_dict}
    targets, inside, excluded, missed = [], (), False, False
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, Adapted):
            inside += (f"{name}.",)
        chosen = match(config, name) if stored is None else name.removeprefix(COMPILED) in stored
        if name in tied:
            chosen = name == tied[0]
        if chosen:
            targets.append((name, module))
        excluded |= chosen is EXCLUDED
        missed |= not chosen and chosen is not EXCLUDED
    if stored is not None and targets:
        _warn_about_difference(config, model, {name for name, _ in targets})
    return targets, excluded, missed


def _warn_about_difference(config: LoraConfig, model: nn.Module, stored: set[str]) -> None:
    """Say where the layers of a state dict are not those that the config selects."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(layers)]
    configured = {name for name in names if match(config, name)}
    text = ""
    if more := sorted(configured - stored):
        text += f"The PEFT config contained these additional target modules: {more}. "
    if more := sorted(stored - configured):
        text += f"The state_dict contained these additional target modules: {more}. "
    if text:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. " + text,
            RuntimeWarning,
            stacklevel=6,
        )


def warn_about_experts(config: LoraConfig, model: nn.Module) -> None:
    """Say where target_modules names an expert's projection that the model keeps in one stack with the other experts'.

    transformers 5 does so with the layers of older ones: gate_proj and up_proj are gate_up_proj there.
    """
    wanted = config.target_modules or ()
    named = [wanted] if isinstance(wanted, str) else sorted(wanted)
    named = [name for name in named if any(part in name for part in ("gate_proj", "up_proj", "down_proj"))]
    stacks = [path for path, p in model.named_parameters() if p.dim() == 3 and ends_with(path, STACKS)]
    left = [path for path in stacks if not ends_with(path.replace(".base_layer", ""), config.target_parameters or ())]
    if named and left:
        warnings.warn(
            f"target_modules names {', '.join(named)}, but the experts of this model are stacked parameters such as "
            f"{left[0]}, which get no adapter; target_parameters={list(STACKS)} adapts them.",
            RuntimeWarning,
            stacklevel=5,
        )


def warn_about_names(config: LoraConfig, model: nn.Module) -> None:
    """Say which names in target_modules and modules_to_save no module has, where others do, as one that is misspelt.

    The names that are usual for a type of model or of task need not all be there.
    """
    names = [name for name, _ in model.named_modules()]
    targets = config.target_modules if isinstance(config.target_modules, set) else set()
    if targets == set(DEFAULT_TARGETS.get(model_config(model).get("model_type"), ())):
        targets = set()
    lost_targets = sorted(one for one in targets if not any(ends_with(name, [one]) for name in names))
    saved = set(config.modules_to_save or ()) - TASK_HEADS
    lost_saved = sorted(one for one in saved if not any(name.endswith(one) for name in names))
    for field, lost in (("target_modules", lost_targets), ("modules_to_save", lost_saved)):
        if lost:
            warnings.warn(
                f"{field} names {', '.join(lost)}, but no module of the model is called so."
                f"{nearest_names(lost, model)}",
                RuntimeWarning,
                stacklevel=5,
            )


def warn_about_targets(config: LoraConfig, modules: list[str], parameters: list[str], may_keep_all: bool) -> None:
    """Say which settings have not done anything."""
    if config.exclude_modules and not may_keep_all:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=5,
        )
    for field, found in (("target_modules", modules), ("target_parameters", parameters)):
        if (wanted := getattr(config, field)) and not found:
            kind = field.removeprefix("target_")[:-1]
            warnings.warn(f"{field}={wanted} were set but no {kind} was matched.", RuntimeWarning, stacklevel=5)
    for field in ("rank_pattern", "alpha_pattern"):
        names = modules + parameters
        patterns = getattr(config, field)
        unused = [key for key in patterns if all(pattern_value({key: True}, name, None) is None for name in names)]
        if unused:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=5,
            )
