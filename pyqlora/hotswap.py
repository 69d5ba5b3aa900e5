"""Hot swapping: an adapter's values replaced in place by another's, for models that are compiled or served.

The parameters stay the same objects, so whatever holds them (a compiled graph, an optimizer) sees the new values. A
smaller rank leaves rows of zeros, a larger one gives the parameter larger memory. `prepare_model_for_compiled_hotswap`
makes room for the largest rank beforehand and turns scalings into tensors: a compiled model is then not compiled again.

All keys and shapes are checked before the first value changes. A forward in another thread may see half of a swap:
turns.py says what threads may do at once.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyqlora.adapter_files import PREFIX, by_own_names, file_keys, load_peft_weights
from pyqlora.config import LoraConfig, PeftConfig
from pyqlora.experts import target_stacks
from pyqlora.inject import pattern_value
from pyqlora.layers import ConvNd, Embedding, Linear
from pyqlora.lora_layer import LoraLayer
from pyqlora.parameters import ParamWrapper
from pyqlora.turns import in_turn
from pyqlora.variants import scaling_factor

RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
RANK_ATTRIBUTES = {"lora_A": ("out_features", "out_channels"), "lora_B": ("in_features", "in_channels")}
FIXED = ("peft_type", "use_dora", "lora_bias", "bias")  # settings that a swap cannot change


class Slot(NamedTuple):
    """A parameter of an adapter, and where its rank is.

    Attributes:
        parameter: the parameter.
        holder: the module that has it, None if the layer itself does.
        kind: its attribute in the layer, as "lora_A".
        axis: the dimension of the rank, None if it has none (biases, DoRA's magnitudes, modules trained whole).
        blocks: A of a grouped convolution holds the ranks of each group one after another.
    """

    parameter: nn.Parameter
    holder: nn.Module | None = None
    kind: str = ""
    axis: int | None = None
    blocks: int = 1

    def padded(self, value: Tensor, rank: int) -> Tensor:
        """`value` with zeros up to `rank`, the size of its rank dimension."""
        shape = list(value.shape)
        missing = (rank - shape[self.axis]) // self.blocks
        if not missing:
            return value
        shape[self.axis : self.axis + 1] = [self.blocks, shape[self.axis] // self.blocks]
        zeros = shape.copy()
        zeros[self.axis + 1] = missing
        value = torch.cat([value.reshape(shape), value.new_zeros(zeros)], self.axis + 1)
        return value.flatten(self.axis, self.axis + 1)

    def put(self, value: Tensor) -> None:
        """Write values of the same rank or a smaller one in place; for a larger rank the memory is replaced."""
        value = value.detach().to(self.parameter)
        if self.axis is not None and value.shape[self.axis] > self.parameter.shape[self.axis]:
            self.parameter.data = value.clone()
            for attribute in RANK_ATTRIBUTES.get(self.kind, ()):
                if hasattr(self.holder, attribute):
                    groups = getattr(self.holder, "groups", 1) if self.axis else 1
                    setattr(self.holder, attribute, value.shape[self.axis] * groups)
        else:
            rank = None if self.axis is None else self.parameter.shape[self.axis]
            self.parameter.data.copy_(value if rank is None else self.padded(value, rank))


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give the adapter `adapter_name` the weights, rank and alpha of a saved one; its name stays.

    Args:
        model: a PeftModel, compiled or not.
        model_name_or_path: the new adapter's directory, or repository on the hub.
        adapter_name: the adapter to replace.
        torch_device: where the file is read to; the values end where the old ones are in any case.
        kwargs: for the hub: subfolder, revision, token, …

    Raises:
        ValueError: no such adapter, or one that differs in more than rank, alpha, dropout and scaling.
        RuntimeError: the new adapter has weights that the old one has no place for; nothing is changed then.
    """
    configs = model.peft_config
    if adapter_name not in configs:
        raise ValueError(f"hotswap_adapter: no adapter {adapter_name!r} in this model, it has {sorted(configs)}")
    config = PeftConfig.from_pretrained(str(model_name_or_path), **kwargs)
    check_hotswap_configs_compatible(configs[adapter_name], config)
    weights = load_peft_weights(str(model_name_or_path), device=torch_device, **kwargs)
    names = file_keys(_plain(model), adapter_name)
    target_stacks(config, model.get_base_model())
    weights = by_own_names(model, weights, names, PREFIX)
    named = {names.get(key) or _with_adapter(key, adapter_name): value for key, value in weights.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


@in_turn
@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Give an adapter new weights, which are named as in the model (`….lora_A.default.weight`).

    Layers that the new weights leave out get zeros.

    Args:
        model: a model with the adapter, compiled or not.
        state_dict: the new weights.
        adapter_name: the adapter to replace.
        config: the new adapter's; the model's own config of the adapter takes over its ranks and scalings.
        parameter_prefix: accepted as in PEFT.

    Raises:
        RuntimeError: weights without a place in the model, or a module trained whole that they leave out.
        ValueError: a weight whose shape differs in more than the rank.
    """
    model = _plain(model)
    slots, layers, whole = _slots(model, adapter_name)
    if not slots:
        raise ValueError(f"hotswap_adapter: no layer of this model has an adapter {adapter_name!r}")
    _check(slots, whole, state_dict)
    for name, slot in slots.items():
        if name in state_dict:
            slot.put(state_dict[name])
        else:
            slot.parameter.data.zero_()
    for target, layer in layers:
        r = pattern_value(config.rank_pattern, target, config.r)
        alpha = pattern_value(config.alpha_pattern, target, config.lora_alpha)
        layer.use_rslora[adapter_name] = config.use_rslora
        _set_scaling(layer, adapter_name, scaling_factor(alpha, r, config.use_rslora))
        _set_rank(layer, adapter_name)
    own = getattr(model, "peft_config", {}).get(adapter_name)
    if own is not None:
        own.use_rslora, own.lora_dropout = config.use_rslora, config.lora_dropout
        _describe(own, layers, adapter_name)
    for _, layer in layers:
        dropout = dict(layer.lora_dropout).get(adapter_name)
        if isinstance(dropout, nn.Dropout):
            dropout.p = config.lora_dropout


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Whether an adapter with one config can take the place of one with the other.

    Raises:
        ValueError: a setting differs that decides what parameters there are.
    """
    for key in FIXED:
        old, new = getattr(config0, key, None), getattr(config1, key, None)
        if old != new:
            raise ValueError(f"Configs are incompatible: for {key}, {old} != {new}; load it beside with load_adapter")


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room for adapters of other ranks and scalings, so that swapping them does not compile the model again.

    To be called with the first adapter loaded, before torch.compile. What the model computes stays the same.

    Args:
        model: the model with its adapters.
        target_rank: the largest rank to come; None leaves ranks as they are.
        config: the adapters' configs, which take over the new rank and the alpha that keeps their scaling.
        check_compiled: what to do about a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: no adapter, a rank below the present one, or a compiled model.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be "
                "compiled again. Call the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
            )
    model = _plain(model)
    adapters = {name for module in model.modules() if isinstance(module, LoraLayer) for name in module.adapters()}
    if not adapters:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    for name in adapters:
        slots, layers, _ = _slots(model, name)
        if target_rank is not None:
            _check_target([layer for _, layer in layers], name, target_rank)
            for slot in slots.values():
                if slot.axis is not None:
                    groups = getattr(slot.holder, "groups", 1) if slot.axis else 1
                    slot.put(slot.padded(slot.parameter, target_rank // groups))
        for _, layer in layers:
            layer.scaling[name] = torch.as_tensor(layer.scaling[name], device=layer.factors(name)[0].device)
            _set_rank(layer, name)
    if config and target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config]:
            _pad_config(one, target_rank)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside a torch.compile wrapper."""
    return getattr(model, "_orig_mod", model)


def _with_adapter(key: str, adapter_name: str) -> str:
    """The name in memory of a file's key for which the model has no place, to be named in the error."""
    path, _, last = key.rpartition(".")
    return f"{path}.{adapter_name}.{last}"


def _slots(model: nn.Module, adapter: str) -> tuple[dict[str, Slot], list[tuple[str, LoraLayer]], set[str]]:
    """The adapter's parameters by name, its layers with their names in a config, names of modules trained whole."""
    slots: dict[str, Slot] = {}
    layers: list[tuple[str, LoraLayer]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.adapters():
            continue
        target = path.removeprefix(PREFIX).partition(".base_layer")[0]  # attention has a second layer inside
        layers.append((f"{target}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else target, layer))
        blocks = layer.get_base_layer().groups if isinstance(layer, ConvNd) else 1
        ranked = _has_rank(layer)
        for kind, held in layer.parameter_dicts().items():
            if adapter not in held:
                continue
            inner = held[adapter]
            parts = {"": inner} if isinstance(inner, Tensor) else dict(inner.named_parameters())
            for part, parameter in parts.items():
                axis = RANK_AXIS.get(kind) if ranked and part in ("", "weight") else None
                holder = None if isinstance(inner, Tensor) else inner
                name = f"{path}.{kind}.{adapter}" + (f".{part}" if part else "")
                slots[name] = Slot(parameter, holder, kind, axis, 1 if axis else blocks)
    state = dict(model.named_parameters())
    whole = {name for name in file_keys(model, adapter).values() if name not in slots and name in state}
    return slots | {name: Slot(state[name]) for name in whole}, layers, whole


def _has_rank(layer: LoraLayer) -> bool:
    """Whether the rank of the layer's factors may change: not in a stack of experts, nor in a program's own layer."""
    return isinstance(layer, (Linear, Embedding, ConvNd))


def _check(slots: dict[str, Slot], whole: set[str], state_dict: dict[str, Tensor]) -> None:
    if unexpected := [name for name in state_dict if name not in slots]:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    if missing := sorted(whole - state_dict.keys()):
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, it has no weights for {', '.join(missing)}, which the adapter "
            "in the model trained whole"
        )
    for name, value in state_dict.items():
        slot = slots[name]
        old, new = list(slot.parameter.shape), list(value.shape)
        if slot.axis is not None and len(old) == len(new):
            old[slot.axis] = new[slot.axis] = 0
        if old != new:
            raise ValueError(
                f"Hot swapping the adapter did not succeed: {name} has shape {list(value.shape)}, expected "
                f"{list(slot.parameter.shape)}" + ("" if slot.axis is None else " with any rank")
            )


def _check_target(layers: list[LoraLayer], adapter: str, target: int) -> None:
    largest = max(layer.r[adapter] for layer in layers)
    if largest > target:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target}, but the original rank is larger ({largest}). "
            "This is not possible."
        )
    for layer in layers:
        if not _has_rank(layer) and layer.r[adapter] != target:
            raise ValueError(
                f"Trying to pad a {type(layer).__name__} LoRA adapter of rank {layer.r[adapter]} to target rank "
                f"{target}: only linear layers, embeddings and convolutions can be padded"
            )
        groups = layer.get_base_layer().groups if isinstance(layer, ConvNd) else 1
        if target % groups:
            raise ValueError(
                f"Trying to pad a {type(layer).__name__} LoRA adapter with groups={groups} to target rank {target}, "
                f"but the target rank is not divisible by {groups}. Please choose a target rank that is divisible by "
                f"{groups}."
            )


def _set_scaling(layer: LoraLayer, adapter: str, scaling: float) -> None:
    if isinstance(layer.scaling[adapter], Tensor):
        layer.scaling[adapter].fill_(scaling)
    else:
        layer.scaling[adapter] = scaling


def _set_rank(layer: LoraLayer, adapter: str) -> None:
    """Let the layer's rank be that of its parameters, and its alpha the one that then gives its scaling."""
    if _has_rank(layer):
        layer.r[adapter] = layer.factors(adapter)[0].shape[0]
    layer.lora_alpha[adapter] = _alpha(float(layer.scaling[adapter]), layer.r[adapter], layer.use_rslora[adapter])


def _alpha(scaling: float, r: int, use_rslora: bool) -> float:
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def _describe(config: LoraConfig, layers: list[tuple[str, LoraLayer]], adapter: str) -> None:
    """Let a config say the ranks and alphas that the layers have, so that what is saved loads as it ran."""
    ranks = {target: layer.r[adapter] for target, layer in layers}
    alphas = {target: layer.lora_alpha[adapter] for target, layer in layers}
    ((config.r, _),) = Counter(ranks.values()).most_common(1)
    ((config.lora_alpha, _),) = Counter(alphas.values()).most_common(1)
    config.rank_pattern = {target: r for target, r in ranks.items() if r != config.r}
    config.alpha_pattern = {target: alpha for target, alpha in alphas.items() if alpha != config.lora_alpha}


def _pad_config(config: LoraConfig, target: int) -> None:
    """The rank everywhere, and the alphas that keep every scaling."""

    def alpha(old: float, r: int) -> float:
        return _alpha(scaling_factor(old, r, config.use_rslora), target, config.use_rslora)

    alphas = {key: alpha(config.alpha_pattern.get(key, config.lora_alpha), r) for key, r in config.rank_pattern.items()}
    others = {key: alpha(value, config.r) for key, value in config.alpha_pattern.items()}
    config.alpha_pattern = others | alphas
    config.lora_alpha = alpha(config.lora_alpha, config.r)
    config.r = target
    config.rank_pattern = dict.fromkeys(config.rank_pattern, target)
