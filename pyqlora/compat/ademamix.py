"""AdEMAMix in plain torch: the reference that bitsandbytes keeps beside its own."""

from __future__ import annotations

import math
from typing import Any

import torch


def scheduled(group: dict[str, Any]) -> tuple[float, float]:
    """(alpha, beta3) at the group's step: alpha grows linearly, beta3 so that its half-life does."""
    step, alpha, (beta1, _, beta3) = group["step"], group["alpha"], group["betas"]
    if group["t_alpha"] is not None:
        alpha = min(step / group["t_alpha"], 1.0) * alpha
    if group["t_beta3"] is not None:
        part = step / group["t_beta3"]
        log1, log3 = math.log(beta1), math.log(beta3)
        beta3 = min(math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)), beta3)
    return alpha, beta3


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """Adam with a second, slow mean of the gradient (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1).

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the fast mean, of the squares, of the slow mean.
        alpha: weight of the slow mean.
        eps: added to the denominator.
        weight_decay: decoupled.
        t_beta3, t_alpha: steps over which beta3 and alpha reach their values; None for at once.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "t_beta3": t_beta3, "t_alpha": t_alpha, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure`, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)
        return loss

    def _update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["m1_m2"] = torch.stack([torch.zeros_like(p)] * 2)
            state["nu"] = torch.zeros_like(p)
        beta1, beta2, _ = group["betas"]
        alpha, beta3 = scheduled(group)
        fast, slow = state["m1_m2"]
        fast.lerp_(p.grad, 1 - beta1)
        slow.lerp_(p.grad, 1 - beta3)
        state["nu"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        size = (state["nu"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
        direction = (fast / (1 - beta1 ** group["step"]) + alpha * slow) / size
        p.sub_(direction + group["weight_decay"] * p, alpha=group["lr"])
