"""An adapter that has taken its start out of the base weight (PiSSA, OLoRA) as plain LoRA of the untouched base."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from pyqlora.adapter_files import load_peft_weights
from pyqlora.config import LoraConfig

SPLITTING = {"pissa": "PiSSA", "olora": "OLoRA"}  # init_lora_weights that change the base weight


def splitting_method(config: LoraConfig) -> str | None:
    """The name of the initialisation if it has changed the base weight."""
    return SPLITTING.get(str(config.init_lora_weights).lower().partition("_niter_")[0])


def as_plain_lora(
    config: LoraConfig, weights: dict[str, Tensor], path_initial: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and weights, of twice the rank, of the change that training has made.

    W = W' + s·B₀A₀ was split at the start, and the adapted weight is W' + s·BA = W + s·(BA − B₀A₀): the new factors
    are [B, −B₀] and [A; A₀], with the same scaling s.

    Args:
        config: of the trained adapter.
        weights: its weights by their keys in a file.
        path_initial: where the adapter was saved before its training.

    Raises:
        ValueError: another initialisation, DoRA, or the saved start is of other layers or shapes.
    """
    if splitting_method(config) is None:
        raise ValueError(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter "
            f"to a LoRA adapter; this one has init_lora_weights={config.init_lora_weights!r}"
        )
    if config.use_dora:
        raise ValueError("`path_initial_model_for_weight_conversion`: a DoRA adapter cannot be written as plain LoRA")
    initial = load_peft_weights(path_initial)
    factors = {key for key in weights if ".lora_A" in key or ".lora_B" in key}
    if wrong := sorted(key for key in factors if key not in initial or initial[key].shape != weights[key].shape):
        raise ValueError(f"{path_initial} is not the start of this adapter: it differs in {', '.join(wrong[:5])}")
    joined = {}
    for key, value in weights.items():
        start = initial[key].to(value) if key in factors else None
        if start is not None:
            value = torch.cat([value, start]) if ".lora_A" in key else torch.cat([value, -start], dim=1)
        joined[key] = value
    factor = math.sqrt(2) if config.use_rslora else 2
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return config, joined
