"""LARS in plain torch: the reference that bitsandbytes keeps beside its own."""

from __future__ import annotations

from typing import Any

import torch


class PytorchLARS(torch.optim.SGD):
    """SGD with momentum whose step is at most `max_unorm` times the norm of the parameter (You 2017, arXiv:1708.03888).

    The limit scales the learning rate down for the parameters where it is exceeded; arguments else are SGD's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self.max_unorm = max_unorm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure`, if given, recomputes the loss, which is returned."""
        before = [(group["lr"], p, p.clone()) for group in self.param_groups for p in group["params"]]
        loss = super().step(closure)
        for lr, p, old in before:
            change = p - old
            limit, size = self.max_unorm * old.norm(), change.norm() / lr
            if self.max_unorm > 0 and size > limit:
                p.copy_(old + change * (limit / size))
        return loss
