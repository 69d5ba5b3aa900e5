"""Optimizer states: their tensors, their 8-bit code, and what other optimizers' checkpoints call them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyqlora.ops.optim_step import BLOCKSIZE, RULES
from pyqlora.ops.paged import Spec
from pyqlora.quant_maps import create_dynamic_map

# bitsandbytes hides the quantized state from FSDP under this key of each parameter's state.
WRAPPER = "__bnb_optimizer_quant_state__"
WRAPPED = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "unorm_vec")

# torch.optim's names of the states, in the order of ours.
TORCH_NAMES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "momentum": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}


def state_specs(rule: str, p: Tensor, bits: int) -> dict[str, Spec]:
    """Names, shapes and dtypes of the state tensors of one parameter."""
    stacked, two = RULES[rule].stacked, RULES[rule].two
    lead = (stacked,) if stacked > 1 else ()
    dtype = torch.uint8 if bits == 8 else torch.float32
    specs: dict[str, Spec] = {"state1": ((*lead, *p.shape), dtype)}
    if two:
        specs["state2"] = (tuple(p.shape), dtype)
    if bits == 8:
        blocks = math.ceil(p.numel() / BLOCKSIZE)
        specs["absmax1"] = ((*lead, blocks), torch.float32)
        if two:
            specs["absmax2"] = ((blocks,), torch.float32)
    return specs


def encode(x: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n] to (uint8 codes [n], float32 absmax [blocks]), by the nearest entry, the lower one on a tie."""
    padded = torch.nn.functional.pad(x, (0, -x.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = padded.abs().amax(1)
    factor = torch.where(absmax >= torch.finfo(torch.float32).tiny, 1.0 / absmax, 0.0)
    middles = (qmap[1:].double() + qmap[:-1].double()) / 2
    codes = torch.bucketize((padded * factor[:, None]).double(), middles)
    return codes.to(torch.uint8).view(-1)[: x.numel()], absmax


def decode(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """uint8 codes [n] and their absmax per block to float32 [n]."""
    return qmap[codes.long()] * absmax.repeat_interleave(BLOCKSIZE)[: codes.numel()]


def convert(state: dict[str, Any], rule: str, p: Tensor, bits: int) -> dict[str, Tensor]:
    """The tensors of a state of either width in this width, by their names in `state_specs`."""
    out: dict[str, Tensor] = {}
    for key, (shape, dtype) in state_specs(rule, p, bits).items():
        if not key.startswith("state"):
            continue
        saved, suffix = state.get(key), key[-1]
        if saved is None or saved.numel() != math.prod(shape):
            got = "none" if saved is None else f"{saved.numel()} elements"
            raise ValueError(f"load_state_dict: {key}: expected {math.prod(shape)} elements, got {got}")
        saved, rows = saved.detach().to(p.device), shape[0] if RULES[rule].stacked > 1 and key == "state1" else 1
        qmap = create_dynamic_map(signed=key == "state1").to(p.device)
        if saved.dtype == torch.uint8:
            absmax = state[f"absmax{suffix}"].detach().to(p.device)
            if dtype == torch.uint8:
                out[key], out[f"absmax{suffix}"] = saved.view(shape), absmax
            else:
                pairs = zip(saved.view(rows, -1), absmax.view(rows, -1), strict=True)
                out[key] = torch.stack([decode(q, a, qmap) for q, a in pairs]).view(shape)
        elif dtype == torch.uint8:
            codes, absmax = zip(*[encode(x, qmap) for x in saved.float().reshape(rows, -1)], strict=True)
            out[key] = torch.stack(codes).view(shape)
            out[f"absmax{suffix}"] = torch.stack(absmax) if rows > 1 else absmax[0]
        else:
            out[key] = saved.float().reshape(shape)
    return out


def from_checkpoint(saved: dict[str, Any], rule: str) -> dict[str, Any]:
    """One parameter's state as saved by bitsandbytes, torch.optim or pyqlora, under bitsandbytes' names.

    Raises:
        ValueError: a state of another kind of optimizer, or on a map that is not the dynamic one.
    """
    state = {**saved, **saved.get(WRAPPER, {})}
    if "max_exp_avg_sq" in state:
        raise ValueError("load_state_dict: a state of amsgrad=True cannot be continued: pyqlora has no amsgrad")
    for ours, theirs in zip(("state1", "state2"), TORCH_NAMES.get(RULES[rule].name, ()), strict=False):
        if ours not in state and state.get(theirs) is not None:
            state[ours] = state[theirs]
    if "state1" not in state:
        raise ValueError(
            f"load_state_dict: expected the state of an optimizer with the rule {rule}, got {sorted(saved)}"
        )
    for key in ("qmap1", "qmap2"):
        if key in state and not torch.equal(state[key].cpu(), create_dynamic_map(signed=key == "qmap1")):
            raise ValueError(f"load_state_dict: {key}: expected the dynamic map of create_dynamic_map, got another")
    state["step"] = int(state.get("step", 1))
    return state
