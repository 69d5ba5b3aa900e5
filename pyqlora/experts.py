"""The experts of a mixture, which transformers 5 keeps in stacked parameters.

transformers 4 had a linear layer for every projection of every expert: `experts.3.gate_proj`. A config that names
those, and an adapter that was trained on them, are brought to the stacks here: `experts.gate_up_proj` holds gate_proj
and up_proj of all experts. Which projections went where is read from transformers' table for loading checkpoints.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import inject
from pyqlora.config import LoraConfig
from pyqlora.kinds import LAYERS, is_linear
from pyqlora.lora_layer import PREFIX
from pyqlora.parameters import ParamWrapper, own_parameters
from pyqlora.variants import scaling_factor

ROUTERS = ("gate",)  # linear layers in transformers 4, modules of their own kind with a `weight` in 5
_EXPERT_KEY = re.compile(r"(.+)\.(\d+)\.(\w+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Stack:
    """One stacked parameter: its module's name, as far as all layers have it alike, its own, and what it was."""

    container: str
    parameter: str
    projections: tuple[str, ...]

    def holds(self, path: str) -> bool:
        """Whether that full name is one of such a parameter."""
        return inject.ends_with(path, [f"{self.container}.{self.parameter}"])


def conversions(model: nn.Module) -> list[Any]:
    """What transformers does to a checkpoint of the model; empty for other models and for transformers 4."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return get_model_conversion_mapping(model)


def stacks(conversions: list[Any]) -> list[Stack]:
    """Those conversions that stack the weights of experts, one projection's or several one below the other."""
    found = []
    for conversion in conversions:
        steps = [type(step).__name__ for step in getattr(conversion, "operations", ())]
        if steps not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            continue
        (target,) = conversion.target_patterns
        container, _, parameter = target.rpartition(".")
        names = [source.removesuffix(".weight").rpartition(".")[2] for source in conversion.source_patterns]
        found.append(Stack(container.strip("."), parameter, tuple(names)))
    return found


def target_stacks(config: LoraConfig, model: nn.Module) -> None:
    """Move the experts' projections and routers that `target_modules` names to `target_parameters`, in place.

    A stack of several projections gets the sum of their ranks, which is what their adapters together have. Projections
    of that name outside of the experts stay targets; a regular expression is replaced by the names it selects.

    Raises:
        ValueError: only some of the projections in one stack are targeted, or with unlike scaling.
    """
    known = conversions(model)
    kinds = stacks(known)
    modules = {_plain(path): module for path, module in model.named_modules() if path and f".{PREFIX}" not in path}
    found = [(path, stack) for path in _parameter_names(model) for stack in kinds if stack.holds(path)] if kinds else []
    if not found or config.target_modules is None:
        return
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == inject.ALL_LINEAR

    def targeted(paths: list[str], *holders: str) -> bool:
        """Whether a layer is a target by any of its names, and neither it nor what holds it is excluded."""
        answers = [inject.match(config, old) for path in paths for old in _old_names(known, path)]
        excluded = inject.EXCLUDED in answers or any(inject.match(config, h) is inject.EXCLUDED for h in holders)
        return not excluded and (every or any(answers))

    chosen: dict[str, list[str]] = {}  # the end of a parameter's name -> full names
    carried: list[str] = []
    for path, stack in found:
        container = path.rpartition(".")[0]
        named = [
            name
            for name in stack.projections
            if targeted([f"{container}.0.{name}", f"{container}.{name}"], path, container)
        ]
        if named and len(named) < len(stack.projections):
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(named)} without also targeting "
                f"{', '.join(name for name in stack.projections if name not in named)} because they are fused into "
                f"{stack.parameter}."
            )
        if named:
            chosen.setdefault(stack.parameter, []).append(path)
            names = [f"{container}.0.{name}" for name in named]
            _carry_patterns(config, stack, path, names)
            carried += names
    for router in _routers(modules, [path for path, _ in found]):
        if targeted([router]):
            chosen.setdefault(f"{router.rpartition('.')[2]}.weight", []).append(f"{router}.weight")
    stacked = [path for path, _ in found]
    for field in ("rank_pattern", "alpha_pattern"):
        spent = [key for key in getattr(config, field) if _matches(key, carried)]
        spent = [key for key in spent if not _matches(key, [*modules, *stacked])]
        setattr(config, field, {key: value for key, value in getattr(config, field).items() if key not in spent})
    if not every:
        _keep_layers(config, modules, {*ROUTERS, *(name for _, stack in found for name in stack.projections)})
    parameters = set(config.target_parameters or ())
    for ending, paths in chosen.items():
        everywhere = len(paths) == sum(inject.ends_with(path, [ending]) for path in _parameter_names(model))
        parameters |= {ending} if everywhere else set(paths)
    config.target_parameters = sorted(parameters) or None


def _plain(path: str) -> str:
    """A name without what wraps the layer."""
    return path.replace(".base_layer", "")


def _parameter_names(model: nn.Module) -> list[str]:
    """Full names of the model's parameters, 4-bit ones too, without what wraps them."""
    names = [f"{path}.{name}" for path, module in model.named_modules() for name, _ in own_parameters(module)]
    return list(dict.fromkeys(_plain(name) for name in names))


def _old_names(known: list[Any], path: str) -> list[str]:
    """A module's name here, and what it was in transformers 4."""
    names = [path]
    for conversion in known:
        if not hasattr(conversion, "operations") and len(conversion.source_patterns) == 1:
            old, new = conversion.source_patterns[0], conversion.target_patterns[0]
            if re.fullmatch(r"\.\w+\.", old) and re.fullmatch(r"\.\w+\.", new) and new in path:
                names.append(path.replace(new, old))
    return names


def _matches(pattern: str, names: list[str]) -> bool:
    return any(inject.pattern_value({pattern: True}, name, False) for name in names)


def _carry_patterns(config: LoraConfig, stack: Stack, path: str, names: list[str]) -> None:
    """Give the stack the rank and alpha with which all its projections keep their own."""
    ranks = [inject.pattern_value(config.rank_pattern, name, config.r) for name in names]
    alphas = [inject.pattern_value(config.alpha_pattern, name, config.lora_alpha) for name in names]
    scales = [scaling_factor(alpha, r, config.use_rslora) for alpha, r in zip(alphas, ranks, strict=True)]
    if not all(math.isclose(scale, scales[0]) for scale in scales):
        raise ValueError(
            f"{', '.join(stack.projections)} are one parameter in this model, {stack.parameter}, whose adapter has one "
            f"scaling, but r, lora_alpha and their patterns give them {scales}"
        )
    rank = sum(ranks)
    alpha = alphas[0] * math.sqrt(rank / ranks[0]) if config.use_rslora else sum(alphas)
    for field, value, default in (("rank_pattern", rank, config.r), ("alpha_pattern", alpha, config.lora_alpha)):
        patterns = getattr(config, field)
        if inject.pattern_value(patterns, path, default) != value:
            key = rf".*\.{stack.parameter}"
            # The first key that matches counts.
            setattr(config, field, {re.escape(path) if key in patterns else key: value, **patterns})


def _routers(modules: dict[str, nn.Module], stacked: list[str]) -> Iterator[str]:
    """Names of the routers beside the experts that are no linear layers."""
    for beside in dict.fromkeys(path.rpartition(".")[0].rpartition(".")[0] for path in stacked):
        for path in (f"{beside}.{name}" for name in ROUTERS):
            weight = getattr(modules.get(path), "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not is_linear(modules[path]):
                yield path


def _keep_layers(config: LoraConfig, modules: dict[str, nn.Module], moved: set[str]) -> None:
    """Leave in target_modules what names layers; a name that was moved to the parameters only if layers have it too."""
    layers = [path for path, module in modules.items() if any(fits(module) for fits, _ in LAYERS)]
    if isinstance(config.target_modules, str):
        selected = {path for path in layers if inject.match(config, path)}
        if selected or config.target_parameters:
            config.target_modules = inject.minimal_targets(selected, [path for path in modules if path not in selected])
        return
    config.target_modules = {
        name
        for name in config.target_modules
        if name.rpartition(".")[2] not in moved or any(inject.ends_with(path, [name]) for path in layers)
    }


def stack_factors(parts: list[list[Tensor]], left: bool) -> Tensor:
    """One factor for a stack, from those of its projections.

    Args:
        parts: for each projection in order a list of each expert's A [r, in], or B [out, r].
        left: they are Bs.

    Returns:
        A [experts · Σr, in], or B [Σout, Σr · experts], in the order of ParamWrapper.
    """
    experts = list(zip(*parts, strict=True))
    if left:
        return torch.stack([torch.block_diag(*expert) for expert in experts], dim=-1).flatten(1)
    return torch.cat([torch.cat(expert) for expert in experts])


def stack_weights(model: nn.Module, weights: dict[str, Tensor], places: Collection[str]) -> dict[str, Tensor]:
    """An adapter's weights by the names that the model has: renamed as its checkpoint is, and experts stacked.

    Keys that this brings to no place stay as they are, experts too of which some are missing.

    Args:
        model: the base model with the adapter in place.
        weights: by the keys of a file, without "base_model.model.".
        places: the keys for which the model has a place.
    """
    known = conversions(model)
    result: dict[str, Tensor] = {}
    experts: dict[tuple[str, ...], dict[int, str]] = {}  # container, projection, A or B -> the experts' keys
    for key, value in weights.items():
        new = key
        for renaming in (conversion for conversion in known if not hasattr(conversion, "operations")):
            new = renaming.rename_source_key(new)[0]
        if found := _EXPERT_KEY.fullmatch(new):
            container, index, projection, factor = found.groups()
            experts.setdefault((container, projection, factor), {})[int(index)] = key
        result[new if new in places else key] = value
    kinds = stacks(known) if experts else []
    wrappers = [(path, layer) for path, layer in model.named_modules() if kinds and isinstance(layer, ParamWrapper)]
    for path, layer in wrappers:
        container = _plain(path)
        stack = next((stack for stack in kinds if stack.holds(f"{container}.{layer.parameter_name}")), None)
        for factor in "AB" if stack is not None else "":
            parts = [experts.get((container, projection, factor), {}) for projection in stack.projections]
            if all(sorted(part) == list(range(layer.num_experts)) for part in parts):
                taken = [[result.pop(part[index]) for index in sorted(part)] for part in parts]
                result[f"{path}.lora_{factor}.weight"] = stack_factors(taken, left=factor == "B")
    return result
