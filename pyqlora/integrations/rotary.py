"""transformers' rotary position embedding on a CPU, in one pass: `pyqlora.ops.rotary`.

transformers' attention layers call a function of their own file, `apply_rotary_pos_emb`. `use_cpu_rotary` finds those
of a model that compute what the operation does, by trying them, and puts another function in their place. It gives the
same bits, so that it does not matter which models of the process share the file, or whether they train; where the
operation does not serve, it calls the function that was there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.ops.backend import is_fast
from pyqlora.ops.rotary import rotary, serves

NAME = "apply_rotary_pos_emb"

Rotation = Callable[..., tuple[Tensor, Tensor]]


def use_cpu_rotary(model: nn.Module) -> int:
    """Switch the rotary position embedding of the files that a model's layers come from.

    Returns:
        How many functions were switched.
    """
    if not is_fast() or not all(p.is_cpu for p in model.parameters()):
        return 0
    count = 0
    for file in {type(module).__module__ for module in model.modules()}:
        function = getattr(sys.modules.get(file), NAME, None)
        if callable(function) and not hasattr(function, "_switched_from") and _is_rotary(function):
            setattr(sys.modules[file], NAME, _switched(function))
            count += 1
    return count


def _switched(function: Rotation) -> Rotation:
    @functools.wraps(function)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
        if args or kwargs or not serves(q, k, cos, sin):
            return function(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin)

    apply_rotary_pos_emb._switched_from = function
    return apply_rotary_pos_emb


@torch.no_grad()
def _is_rotary(function: Rotation) -> bool:
    """Whether the function takes q, k, cos and sin, and gives the operation's bits for any of them."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    for positions in (1, 2):
        sizes = (2, 6, 5, 8), (2, 3, 5, 8), (positions, 5, 8), (positions, 5, 8)
        for dtype in (torch.float32, torch.bfloat16):
            given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
            try:
                got = function(*given)
            except Exception:  # whatever another function says to these: it is not the formula
                return False
            if not (isinstance(got, tuple) and len(got) == 2 and all(map(torch.equal, got, rotary(*given)))):
                return False
    return True
