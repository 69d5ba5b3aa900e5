"""optim_step: one step of one optimizer over many tensors in one native call; formulas in csrc/core/optim_rules.h."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyqlora.ops.backend import native

BLOCKSIZE = 256
NORM_CHUNK = 2048  # elements whose squares are summed together, in 16 bytes of workspace


@dataclass(frozen=True)
class Rule:
    """What the states of an optimizer look like.

    `name` is the native rule; state1 stacks `stacked` averages; `two` says whether there is a state2.
    """

    name: str
    stacked: int = 1
    two: bool = False


# LAMB and LARS are Adam and momentum under a limit on the update's norm.
RULES = {
    "adam": Rule("adam", two=True),
    "lamb": Rule("adam", two=True),
    "ademamix": Rule("ademamix", stacked=2, two=True),
    "lion": Rule("lion"),
    "momentum": Rule("momentum"),
    "lars": Rule("momentum"),
    "rmsprop": Rule("rmsprop"),
    "adagrad": Rule("adagrad"),
}


@dataclass
class Batch:
    """Tensors that are stepped together: parallel lists, of one dtype, one device and one form of state."""

    steps: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    state1: list[Tensor] = field(default_factory=list)
    state2: list[Tensor] = field(default_factory=list)
    absmax1: list[Tensor] = field(default_factory=list)
    absmax2: list[Tensor] = field(default_factory=list)
    unorm: list[Tensor] = field(default_factory=list)
    qmap1: Tensor | None = None
    qmap2: Tensor | None = None

    def add(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]) -> None:
        """Append parameters with their states, whose `step` already counts this one."""
        self.steps += [state["step"] for state in states]
        self.params += params
        self.grads += grads
        first = states[0]
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if key in first:
                getattr(self, key).extend([state[key] for state in states])
        if "absmax1" in first:
            self.qmap1, self.qmap2 = first["qmap1"], first.get("qmap2")
        elif "unorm_vec" in first:
            self.unorm += [state["unorm_vec"] for state in states if "unorm_vec" in state]


def optim_step(
    rule: str,
    batch: Batch,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    max_unorm: float,
) -> None:
    """Step `batch.params` and their states in place; `batch.steps` counts from 1 and includes this step.

    Raises:
        ValueError: tensors that do not fit each other.
        RuntimeError: CUDA's own, where a launch fails.
    """
    module, context = native(batch.params[0])
    workspace = None
    if max_unorm > 0:
        chunks = sum(math.ceil(p.numel() / NORM_CHUNK) for p in batch.params)
        workspace = torch.empty(chunks * 16, dtype=torch.uint8, device=batch.params[0].device)
    module.optim_step(
        rule,
        batch.steps,
        batch.params,
        batch.grads,
        batch.state1,
        batch.state2,
        batch.absmax1,
        batch.absmax2,
        batch.qmap1,
        batch.qmap2,
        batch.unorm,
        workspace,
        lr,
        beta1,
        beta2,
        beta3,
        alpha,
        eps,
        weight_decay,
        max_unorm,
        context,
    )
    _increment_versions(batch.params)  # for whoever kept one: autograd, lora_shared_cuda


def _increment_versions(tensors: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # torch 2.4 takes them one by one
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
