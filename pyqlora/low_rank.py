"""LoRA for plain PyTorch models in two small classes, on the same fused operation as everything else.

model = replace_linear_with_lora(model, rank=16, alpha=32)   # every nn.Linear now trains a low-rank update
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyqlora.ops.lora_linear import lora_linear


class LoRALayer(nn.Module):
    """The low-rank map x ↦ alpha/rank · x·A·B, zero at first.

    Args:
        in_dim: size of the input's last dimension.
        out_dim: size of the output's.
        rank: inner size.
        alpha: the map is scaled by alpha / rank.

    Attributes:
        A: [in_dim, rank], Kaiming uniform.
        B: [rank, out_dim], zeros.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float):
        super().__init__()
        if rank <= 0:
            raise ValueError(f"LoRALayer: rank must be positive, got {rank}")
        self.A = nn.Parameter(torch.empty(in_dim, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha
        self.rank = rank

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] to [..., out_dim]."""
        return self.added_to(x.new_zeros(*x.shape[:-1], self.B.shape[1]), x)

    def added_to(self, base: Tensor, x: Tensor) -> Tensor:
        """`base`, which may be overwritten, plus the layer's output for x."""
        return lora_linear(base, x, self.A.t(), self.B.t(), self.scaling, inplace=not base.requires_grad)


class LinearWithLoRA(nn.Module):
    """A frozen linear layer (nn.Linear or Linear4bit) and a trained low-rank one beside it.

    Args:
        linear: the layer, which is kept and frozen.
        rank, alpha: of the LoRALayer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """linear(x) + lora(x), in the dtype of linear(x)."""
        return self.lora.added_to(self.linear(x), x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Freeze the model and wrap each of its linear layers in a LinearWithLoRA, in place.

    Args:
        model: any module; if it is itself a linear layer, the wrapper is returned.
        rank: rank of every update.
        alpha: every update is scaled by alpha / rank.

    Returns:
        The model.

    Raises:
        ValueError: the model has no linear layer.
    """
    if isinstance(model, nn.Linear):
        return LinearWithLoRA(model, rank, alpha)
    model.requires_grad_(False)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"replace_linear_with_lora: the {type(model).__name__} has no nn.Linear")
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LinearWithLoRA(linear, rank, alpha))
    return model
