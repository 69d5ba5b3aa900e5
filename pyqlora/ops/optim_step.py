"""optim_step: one step of one optimizer over many tensors in one native call; formulas in csrc/core/optim_rules.h."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


def optim_step(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
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
    """Step parameters and their states in place.

    Args:
        rule: the `name` of one of `RULES`.
        params: float32, float16 or bfloat16 tensors.
        grads: of the parameters' shapes and dtypes.
        states: with the tensors of `pyqlora.optim.states.state_specs`, their maps (`qmap1`, `qmap2`) if they are codes,
            and `step`, which counts from 1 and includes this one.
        max_unorm: above 0, |u| <= max_unorm |p| for every parameter with float32 states, whose `unorm_vec` takes |u|.

    Raises:
        ValueError: tensors that do not fit each other, or that a state lacks.
        RuntimeError: CUDA's own, where a launch fails.
    """
    module, context = native(params[0])
    workspace = None
    if max_unorm > 0:
        chunks = sum(math.ceil(p.numel() / NORM_CHUNK) for p in params)
        workspace = torch.empty(chunks * 16, dtype=torch.uint8, device=params[0].device)
    hyper = {
        "lr": lr, "beta1": beta1, "beta2": beta2, "beta3": beta3, "alpha": alpha, "eps": eps,
        "weight_decay": weight_decay, "max_unorm": max_unorm,
    }  # fmt: skip
    _increment_versions(params)  # for whoever kept one: autograd, lora_shared_cuda
    left = module.optim_step(rule, params, grads, states, workspace, *hyper.values(), context)
    if left:  # tensors of other devices, and those that are not contiguous
        copies = [params[i].contiguous() for i in left]
        optim_step(rule, copies, [grads[i].contiguous() for i in left], [states[i] for i in left], **hyper)
        for i, copy in zip(left, copies, strict=True):
            if copy is not params[i]:
                params[i].copy_(copy)


def _increment_versions(tensors: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # torch 2.4 takes them one by one
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
