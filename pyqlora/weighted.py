"""add_weighted_adapter: one new adapter from several, as PEFT's combination types define it.

A combination type is a way to merge a list of tensors (linear, ties, dare_linear, dare_ties, magnitude_prune), applied
to A and B apart, or with "_svd" (and plain "svd", which is linear_svd) to the updates B·A, which are then factored
again. "cat" stacks the factors: exact, with a rank that is the sum.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from pyqlora.config import LoraConfig
from pyqlora.lora_layer import LoraLayer

Merge = Callable[[Tensor, Tensor], Tensor]


def keep_largest(x: Tensor, density: float) -> Tensor:
    """x with all but the given share of its elements, the largest by magnitude, set to zero."""
    kept = torch.zeros_like(x).flatten()
    kept[x.abs().flatten().topk(int(density * x.numel())).indices] = 1
    return x * kept.view(x.shape)


def keep_random(x: Tensor, density: float) -> Tensor:
    """x with a random share of its elements kept and the rest set to zero, rescaled to keep its expectation."""
    return x * torch.bernoulli(torch.full_like(x, density)) / density


def elected(stack: Tensor, weights: Tensor, majority: str) -> Tensor:
    """TIES: at each place the weighted mean of the values that have the sign of the majority (arXiv:2306.01708)."""
    votes = stack if majority == "total" else stack.sign()
    sign = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = stack.sign() == sign
    return (stack * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


def tensor_merge(kind: str, density: float | None, majority: str) -> Merge:
    """(stacked tensors, weights that broadcast over them) -> one tensor, for a combination type without "_svd".

    Raises:
        ValueError: an unknown type, or a density outside [0, 1] where the type needs one.
    """
    kinds: dict[str, tuple[Callable[[Tensor, float], Tensor] | None, bool]] = {
        "linear": (None, False),
        "magnitude_prune": (keep_largest, False),
        "ties": (keep_largest, True),
        "dare_linear": (keep_random, False),
        "dare_ties": (keep_random, True),
    }
    if kind not in kinds:
        known = ", ".join(["svd", "cat", *kinds, *(f"{one}_svd" for one in kinds if one != "linear")])
        raise ValueError(f"Invalid combination_type: {kind}, expected one of {known}")
    prune, elect = kinds[kind]
    if prune is not None and (density is None or density < 0):
        raise ValueError(f"Density should be >= 0, got {density}")
    if elect and majority not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {majority!r}")
    if prune is not None and density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=3
        )
        prune = None

    def merge(stack: Tensor, weights: Tensor) -> Tensor:
        if prune is not None:
            stack = torch.stack([prune(x, density) for x in stack])
        return elected(stack, weights, majority) if elect else (stack * weights).sum(0)

    return merge


def weighted_config(configs: dict[str, LoraConfig], adapters: list[str], kind: str, svd_rank: int | None) -> LoraConfig:
    """The config of the combined adapter: its rank, scaling 1, and all the targets.

    Raises:
        ValueError: an unknown adapter or type, ranks or targets that do not go together.
    """
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist")
        if configs[name].target_parameters:
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
            )
    chosen = [configs[name] for name in adapters]
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in chosen]
    if kind == "cat":
        r = sum(ranks)
    elif kind.endswith("svd"):
        r = svd_rank or max(ranks)
    else:
        tensor_merge(kind, 1.0 if kind == "linear" else 0.5, "total")  # an unknown type is refused before the ranks
        if len(set(ranks)) != 1:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                f"dare_linear, got r = {ranks}; 'svd' and 'cat' take any."
            )
        r = ranks[0]
    targets = [config.target_modules for config in chosen]
    if len({type(target) for target in targets}) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. "
            "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
        )
    if isinstance(targets[0], str):
        combined = "|".join(f"({target})" for target in targets)
    elif isinstance(targets[0], set):
        combined = reduce(set.union, targets)
    else:
        raise TypeError(f"Invalid type {type(targets[0])} found in target_modules")
    return dataclasses.replace(
        chosen[0], r=r, lora_alpha=r, target_modules=combined, alpha_pattern={}, rank_pattern={}, use_rslora=False
    )


@torch.no_grad()
def fill(
    layer: LoraLayer,
    name: str,
    weights: dict[str, float],
    kind: str,
    density: float | None,
    majority: str,
    svd: dict,
) -> None:
    """Set the factors of adapter `name` of a layer to the combination of those of the weighted adapters it has."""
    weights = {adapter: weight for adapter, weight in weights.items() if adapter in layer.adapters()}
    if not weights:
        return
    a, b = layer.factors(name)
    if kind == "cat":
        parts = [layer.factors(adapter) for adapter in weights]
        scales = [weight * layer.scaling[adapter] for adapter, weight in weights.items()]
        new_a = torch.cat([part[0] * scale for part, scale in zip(parts, scales, strict=True)])
        new_b = torch.cat([part[1] for part in parts], dim=1)
    elif kind.endswith("svd"):
        merge = tensor_merge(kind.removesuffix("_svd") if kind != "svd" else "linear", density, majority)
        deltas = torch.stack([layer.delta_matrix(adapter) * layer.scaling[adapter] for adapter in weights])
        scales = torch.tensor(list(weights.values()), device=deltas.device)
        merged = merge(deltas, scales.view(-1, *(1,) * (deltas.dim() - 1)))
        new_a, new_b = low_rank(layer.feature_rows(merged), layer.r[name], **svd)
    else:
        merge = tensor_merge(kind, density, majority)
        scales = torch.tensor([weight * layer.scaling[adapter] for adapter, weight in weights.items()])
        roots = scales.abs().sqrt()
        new_a, new_b = (
            merge(
                torch.stack([layer.factors(adapter)[i] for adapter in weights]),
                root.to(a.device).view(-1, *(1,) * a.dim()),
            )
            for i, root in enumerate((roots * torch.where(scales < 0, -1, 1), roots))
        )
    # An adapter with rank_pattern may hold fewer rows here than the rank of the new one: the others stay zero.
    for parameter, value, axis in ((a, new_a, 0), (b, new_b, 1)):
        if value.numel() == parameter.numel():
            value = value.reshape(parameter.shape)
        parameter.data.zero_()
        parameter.data.narrow(axis, 0, value.shape[axis]).copy_(value)


def low_rank(matrix: Tensor, r: int, clamp: float | None, full_matrices: bool, driver: str | None):
    """A [r, in] and B [out, r] with B·A the best approximation of the matrix; clamp cuts values above that quantile."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=full_matrices, driver=driver)
    a, b = vh[:r], u[:, :r][:, : len(s)] * s[:r]
    if clamp is not None:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a[: b.shape[1]], b
