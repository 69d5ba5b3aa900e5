"""Norms and gated layers of transformers' blocks, in training on a CPU, in one pass each: rms_norm and swiglu.

torch computes an RMSNorm and its gradient in some twenty passes over memory. `use_cpu_blocks` finds the modules of a
model that compute what these operations do, by trying them, and has them computed so while they train. In eval mode,
off the CPU and where somebody watches the activation function, they do what they did.

A module is switched by its class: a subclass of its own of the same name, with another forward. Nothing is put on the
module itself, so that its state, hooks, copies, and a forward that accelerate lays over its own are as before.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.layers import is_watched
from pyqlora.ops import rms_norm as norm
from pyqlora.ops import swiglu as gated
from pyqlora.ops.backend import is_fast

_EPS_NAMES = ("variance_epsilon", "eps")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def use_cpu_blocks(model: nn.Module) -> int:
    """Switch the RMSNorms and gated layers of a model on a CPU that gains by it.

    Returns:
        How many modules were switched.
    """
    if not is_fast():
        return 0
    count = 0
    for module in model.modules():
        switched = None if hasattr(type(module), "_switched_from") else _switched(module)
        if switched is not None:
            module.__class__ = switched
            count += 1
    return count


def _switched(module: nn.Module) -> type | None:
    """The class to switch the module to, None if it is to stay as it is."""
    if "forward" in module.__dict__ or not all(p.is_cpu for p in module.parameters()):
        return None
    if type(module).__name__.endswith("RMSNorm"):
        name = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
        return _norm_class(type(module), name) if name and _is_rms_norm(module, name) else None
    if module._modules.keys() == {*_PROJECTIONS, "act_fn"} and not is_watched(module.act_fn) and _is_swiglu(module):
        return _gated_class(type(module), type(module.act_fn))
    return None


def _is_rms_norm(module: nn.Module, eps_name: str) -> bool:
    """Whether the module's forward is rms_norm, with these roundings, for any weight."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or module.weight.dim() != 1:
        return False
    stand_in, eps = copy.copy(module), getattr(module, eps_name)
    stand_in.training = True
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=generator)
    stand_in._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    rows = torch.randn(16, len(weight), generator=generator)
    inputs = [(rows * scale).to(dtype) for scale in (1.0, eps**0.5) for dtype in (torch.float32, torch.bfloat16)]
    return all(_agree(lambda: stand_in.forward(x), lambda: norm.rms_norm(x, weight, eps)) for x in inputs)  # noqa: B023


def _is_swiglu(module: nn.Module) -> bool:
    """Whether the module's forward is down_proj(silu(gate_proj(x)) · up_proj(x)), for any projections."""
    stand_in, generator = copy.copy(module), torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (5, 7), "up_proj": (5, 7), "down_proj": (7, 3)}
    layers = {name: nn.Linear(*size, device="meta") for name, size in sizes.items()}  # leaves torch's generator alone
    for layer in layers.values():
        layer.to_empty(device="cpu").requires_grad_(False)
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    stand_in._modules, stand_in.training = {**module._modules, **layers}, True
    rows = torch.randn(16, 5, generator=generator) * 10  # large enough to meet a limit
    gate, up, down = layers.values()
    return _agree(lambda: stand_in.forward(rows), lambda: down(nn.functional.silu(gate(rows)) * up(rows)))


@torch.no_grad()
def _agree(forward: Any, formula: Any) -> bool:
    """Whether both give the same dtype and, but for a few roundings at a tie, the same values."""
    try:
        got = forward()
    except Exception:  # whatever another forward says to this input: it is not the formula
        return False
    want = formula()
    if not isinstance(got, Tensor) or got.dtype != want.dtype or got.shape != want.shape:
        return False
    return bool((got - want).abs().mean() <= want.abs().mean() * 2.0**-14)


def _new(base: type, *key: Any) -> nn.Module:
    """An empty module of a switched class: what a copy or a pickle begins with."""
    switched = _norm_class(base, *key) if isinstance(key[0], str) else _gated_class(base, *key)
    return switched.__new__(switched)


def _subclass(base: type, key: Any, forward: Any) -> type:
    def __reduce_ex__(self, protocol):
        _, _, *state = base.__reduce_ex__(self, protocol)
        return _new, (base, key), *state

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        base.__name__, (base,), {**names, "_switched_from": base, "forward": forward, "__reduce_ex__": __reduce_ex__}
    )


@cache
def _norm_class(base: type, eps_name: str) -> type:
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and not (args or kwargs) and norm.serves(hidden_states, self.weight):
            return norm.rms_norm(hidden_states, self.weight, getattr(self, eps_name))
        return base.forward(self, hidden_states, *args, **kwargs)

    return _subclass(base, eps_name, forward)


@cache
def _gated_class(base: type, activation: type) -> type:
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        act_fn = self.act_fn
        if not self.training or args or kwargs or type(act_fn) is not activation or is_watched(act_fn):
            return base.forward(self, x, *args, **kwargs)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated.swiglu(gate, up) if gated.serves(gate, up) else act_fn(gate) * up)

    return _subclass(base, activation, forward)
