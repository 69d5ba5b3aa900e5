"""What adapted layers keep while a model generates on a CPU: the calls that they found for x.

For the products of a single token, finding A, B, the scaling and the parts of the weight, all of which may have been
replaced since the last token, takes longer than the call does. So under `PeftModel.generate` each layer finds them
once. Until it returns, weights may change in place, and adapters be switched, scaled, disabled and merged, as a logits
processor may do; parameters and modules that are replaced, and hooks put on the base layers, count from the next
`generate` on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyqlora.ops.backend import is_plain
from pyqlora.rows import served_rows


class Plan:
    """A layer's forward for x of one dtype, with one adapter and without gradients.

    Args:
        layer: the LoRA layer.
        name: its only active adapter.
        x: an input.
        call: what the layer computes for inputs like x.
    """

    __slots__ = ("active", "call", "dtype", "name", "scaling", "training")

    def __init__(self, layer: Any, name: str, x: Tensor, call: Callable[[Tensor], Tensor]):
        self.active, self.training = list(layer._active_adapters), layer.training
        self.name, self.scaling = name, layer.scaling[name]
        self.dtype, self.call = x.dtype, call

    def holds(self, layer: Any, x: Tensor) -> bool:
        """Whether `call` still is what the layer computes, and for this x."""
        return (
            x.dtype is self.dtype
            and is_plain(x)
            and not torch.is_grad_enabled()
            and layer.training is self.training
            and layer._active_adapters == self.active
            and layer.scaling.get(self.name) is self.scaling
            and not (layer._disable_adapters or layer.merged_adapters or served_rows())
        )


class _OfThread(threading.local):
    plans: dict[Any, Plan] | None = None


_kept = _OfThread()


@contextmanager
def keeping_plans() -> Iterator[None]:
    """While open, layers that run in this thread keep plans; they are forgotten at the end."""
    before, _kept.plans = _kept.plans, {}
    try:
        yield
    finally:
        _kept.plans = before


def plans() -> dict[Any, Plan] | None:
    """The plans by their layers, where plans are kept."""
    return None if torch.compiler.is_compiling() else _kept.plans
