"""EVA: A from the principal components of what a layer is fed, and ranks where they explain most.

Paischer et al. 2024, arXiv:2410.07170. Base outputs stay as they are, for B starts at zero. The calls are PEFT's:

    model = get_peft_model(base, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0), …))
    initialize_lora_eva_weights(model, dataloader)
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.attention import MultiheadAttention, OutProjection
from pyqlora.config import LoraConfig
from pyqlora.inject import CONDENSE_FROM, match, minimal_targets, pattern_value
from pyqlora.kinds import is_linear
from pyqlora.layers import Linear
from pyqlora.lora_layer import LoraLayer

LARGEST_RHO = 1000  # above this rho only says "as many as there are"
SEED = 42  # of the randomized decomposition: the same data give the same components
PREFIX = "base_model.model."


class IncrementalPCA:
    """The first principal components of rows that come in batches (Ross et al. 2008, doi:10.1007/s11263-007-0075-7)."""

    def __init__(self, count: int, threshold: float):
        self.count = count
        self.threshold = threshold
        self.seen = 0
        self.mean: Tensor | float = 0.0
        self.spread: Tensor | float = 0.0  # the sum of squared distances to the mean
        self.components: Tensor | None = None  # [count, features], orthonormal
        self.singular_values: Tensor | None = None
        self.converged = torch.zeros(count, dtype=torch.bool)

    def add(self, rows: Tensor) -> None:
        """Count rows [n, features] in; fewer than the components are skipped, for they cannot tell them apart."""
        n = len(rows)
        if n < self.count:
            return
        mean = rows.mean(0, dtype=torch.float64)
        centred = (rows.double() - mean).to(rows.dtype)
        before, total = self.components, self.seen + n
        weight = self.seen * n / total
        self.spread = self.spread + centred.double().square().sum() + weight * (self.mean - mean).square().sum()
        if before is not None:
            shift = weight**0.5 * (self.mean - mean)
            centred = torch.cat([self.singular_values[:, None] * before, centred, shift[None]])
        self.mean, self.seen = (self.mean * self.seen + mean * n) / total, total
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            _, values, vectors = torch.svd_lowrank(centred, q=min(2 * self.count, *centred.shape), niter=4)
        self.singular_values, vectors = values[: self.count], vectors.T[: self.count]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        self.components = vectors * largest.sign()
        if before is not None:
            self.converged = torch.cosine_similarity(self.components, before).cpu() >= self.threshold

    def explained(self, count: int) -> Tensor:
        """The share of the variance that each of the first components explains."""
        return self.singular_values[:count] ** 2 / self.spread


# --- what of a batch is looked at ------------------------------------------------------------------------------------


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch of keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor:
    """[n, 2] indices (row, position) of the tokens to use: no padding, and with use_label_mask only those with a label.

    Raises:
        TypeError: the batch is no dict.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(f"EVA: expected batches that are dicts of tensors, got {type(model_input).__name__}")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask &= model_input["labels"] != peft_config.eva_config.label_mask_value
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a layer's input at those indices."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return _tensor(layer_input, layer_name).flatten(0, -2)


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(first, Tensor):
        raise TypeError(
            f"EVA: {layer_name} is given {type(first).__name__}, expected a tensor; pass a prepare_layer_inputs_fn"
        )
    return first


def _to(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: _to(value, device) for key, value in inputs.items()})
    return type(inputs)(_to(value, device) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


@contextmanager
def _watching(model: nn.Module, names: Iterable[str], see: Callable[[str, Any], None]) -> Iterator[None]:
    """While open, `see(name, inputs)` is called whenever one of these layers has run."""

    def hook(name: str) -> Callable:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            see(name, inputs)

        return watch

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- components and ranks --------------------------------------------------------------------------------------------


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A's first values for every linear layer: {layer's name: [rank, in_features]}, the ranks summing to what r allots.

    Batches are run until the components in use have settled, starting over with the dataloader as often as it takes.

    Args:
        model: the base model, or a PeftModel, which runs with its adapters off.
        dataloader: batches with a length.
        peft_config: of an adapter to come; None for that of `adapter_name`.
        forward_fn: runs (model, batch).
        prepare_model_inputs_fn: from (batch, config) what the next is given as model_input; None for the batch itself.
        prepare_layer_inputs_fn: from (layer input, model_input, layer name) rows [n, in_features]; or one for each
            layer's name; None for all rows.
        adapter_name: see peft_config.
        gather_distributed_inputs: must be False with several processes, whose inputs are not brought together.
        show_progress_bar: say on stderr how many layers have settled.

    Raises:
        ValueError: no batches, no config, a layer that the first batch does not reach, more components than features
            or than any batch has rows.
    """
    adapted = hasattr(model, "peft_config")
    config = model.peft_config[adapter_name] if adapted and peft_config is None else peft_config
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    if len(dataloader) == 0:
        raise ValueError("dataloader is empty")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and gather_distributed_inputs and torch.distributed.get_world_size() > 1:
        raise ValueError(
            "EVA: inputs of several processes are not gathered; give each the same dataloader and pass "
            "gather_distributed_inputs=False"
        )
    names = [name for name, module in model.named_modules() if _is_target(name, module, config, adapted)]
    readers = _readers(names, prepare_layer_inputs_fn)
    device = next(p.device for p in model.parameters() if p.device.type != "meta")

    def run(batch: Any, watched: Iterable[str], use: Callable[[str, Tensor], None]) -> None:
        batch = _to(batch, device)
        seen = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        with _watching(model, watched, lambda name, inputs: use(name, readers[name](inputs, seen, name))):
            forward_fn(model, batch)

    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if adapted else nullcontext():
            return _components(model, config, dataloader, names, run, show_progress_bar)
    finally:
        model.train(training)


def _is_target(name: str, module: nn.Module, config: LoraConfig, adapted: bool) -> bool:
    if adapted:
        return isinstance(module, Linear) and not isinstance(module, (MultiheadAttention, OutProjection))
    return is_linear(module) and (config.target_modules is None or bool(match(config, name)))


def _readers(names: list[str], given: Callable | Mapping[str, Callable] | None) -> dict[str, Callable]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given or _all_rows)
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"prepare_layer_inputs_fn has functions for {unknown}, which are no adapted layers")
    return {name: given.get(name, _all_rows) for name in names}


def _components(
    model: nn.Module, config: LoraConfig, dataloader: Any, names: list[str], run: Callable, show: bool
) -> dict[str, Tensor]:
    first: dict[str, Tensor] = {}
    run(next(iter(dataloader)), names, first.setdefault)
    if missed := [name for name in names if name not in first]:
        raise ValueError(f"EVA: the first batch does not run {', '.join(missed[:5])}; do not target these layers")
    source = _same_inputs(first)
    rho = config.eva_config.rho
    if rho > LARGEST_RHO:
        rho = min(rho, max(max(p.shape, default=1) for p in model.parameters()) // config.r)
    given = {name: pattern_value(config.rank_pattern, name, config.r) for name in names}
    most = {name: max(round(given[other] * rho) for other in names if source[other] == source[name]) for name in names}
    for name in names:
        if most[name] > first[name].shape[-1]:
            raise ValueError(
                f"EVA: up to {most[name]} components (r times rho) of the {first[name].shape[-1]} input features of "
                f"{name}; lower r or rho"
            )
    # Layers with an input of their own before those that share another's: ranks that tie are settled in this order.
    ordered = sorted(names, key=lambda name: source[name] != name)
    found = {name: IncrementalPCA(most[name], config.eva_config.tau) for name in ordered if source[name] == name}
    ranks = most
    for step, batch in enumerate(cycle(dataloader)):
        unsettled = [name for name, pca in found.items() if not pca.converged[: ranks[name]].all()]
        if show:
            print(f"\rEVA: {len(found) - len(unsettled)}/{len(found)} inputs have settled", end="", file=sys.stderr)
        if not unsettled:
            break
        empty = [name for name, pca in found.items() if pca.components is None]
        if step == len(dataloader) and empty:
            raise ValueError(f"EVA: no batch has the {most[empty[0]]} rows that {empty[0]} needs; use larger batches")
        run(batch, unsettled, lambda name, rows: found[name].add(rows.float()))
        if all(pca.components is not None for pca in found.values()):
            ranks = _share_out({name: found[source[name]].explained(most[name]) for name in ordered}, given, source)
    if show:
        print(file=sys.stderr)
    state = {}
    for name in names:
        pca, rank = found[source[name]], ranks[name]
        state[name] = pca.components[:rank].float()
        if config.eva_config.whiten:
            state[name] = state[name] / pca.singular_values[:rank].sqrt().float()[:, None]
    return state


def _same_inputs(first: dict[str, Tensor]) -> dict[str, str]:
    """For every layer the first one that is given the same input, as queries, keys and values are."""
    source: dict[str, str] = {}
    for name, rows in first.items():
        same = (other for other in dict.fromkeys(source.values()) if torch.equal(first[other], rows))
        source[name] = next(same, name)
    return source


def _share_out(explained: dict[str, Tensor], given: dict[str, int], source: dict[str, str]) -> dict[str, int]:
    """Ranks: as many components as the layers were given in all, those that explain most of any layer's variance."""
    owners = [name for name, shares in explained.items() for _ in shares]
    best = torch.cat(list(explained.values())).argsort(descending=True)[: sum(given.values())]
    counts = Counter(owners[i] for i in best.tolist())
    ranks = {name: counts[name] for name in explained}
    for name in explained:  # the layer whose components are computed needs the most of them
        if ranks[source[name]] < ranks[name]:
            ranks[source[name]], ranks[name] = ranks[name], ranks[source[name]]
    return ranks


# --- into the model --------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give the adapter EVA's ranks and first values; layers left with rank 0 lose it, others start as with True.

    Args:
        model: a PeftModel whose only active adapter has init_lora_weights="eva".
        dataloader: see get_eva_state_dict, as for the other arguments.
        eva_state_dict: what that returned, for this model; None to compute it now.

    Raises:
        ValueError: another model or adapter, or neither data nor values.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config = model.peft_config[adapter_name]
    if config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None and dataloader is None:
        raise ValueError("dataloader is required if eva_state_dict is not provided")
    if eva_state_dict is None:
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    targets, ranks, alphas = [], {}, {}
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    others = [name.removeprefix(PREFIX) for name, module in model.named_modules() if not isinstance(module, LoraLayer)]
    for name, layer in layers:
        short = name.removeprefix(PREFIX)
        given = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        components = eva_state_dict.get(name)
        rank = given if components is None else len(components)
        if rank == 0:
            _remove(model, name, layer, adapter_name)
            others.append(short)
            continue
        if config.eva_config.adjust_scaling_factors:
            alpha *= rank / given if rank != given else 1
        _start(layer, adapter_name, rank, alpha, config, components)
        targets.append(short)
        if rank != config.r:
            ranks[short] = rank
        if alpha != config.lora_alpha:
            alphas[short] = alpha
    config.target_modules = minimal_targets(targets, others) if len(targets) >= CONDENSE_FROM else set(targets)
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def _start(
    layer: LoraLayer, adapter_name: str, rank: int, alpha: float, config: LoraConfig, components: Tensor | None
) -> None:
    a = layer.factors(adapter_name)[0]
    if components is None or rank != layer.r[adapter_name] or a.device.type == "meta":
        own = copy.copy(config)
        own.init_lora_weights = "eva" if components is not None else True
        layer.update_layer(adapter_name, rank, alpha, own)
        for parameter in layer.adapter_parameters(adapter_name):
            parameter.data = parameter.data.to(a.dtype)
    if components is not None:
        layer.factors(adapter_name)[0].data.copy_(components)


def _remove(model: nn.Module, name: str, layer: LoraLayer, adapter_name: str) -> None:
    if layer.adapters() != {adapter_name}:
        layer.delete_adapter(adapter_name)
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.get_base_layer())
