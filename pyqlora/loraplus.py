"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from pyqlora.layers import Embedding


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over a model's trainable parameters, in four groups with learning rates of their own.

    Args:
        model: a PeftModel, or any model.
        optimizer_cls: the optimizer, pyqlora's or another.
        lr: the learning rate of A and of all else.
        loraplus_lr_ratio: the learning rate of B, and of vectors such as biases, is this many times `lr`.
        loraplus_lr_embedding: the learning rate of both factors of an adapted embedding.
        loraplus_weight_decay: of everything but vectors, norms and biases, which do not decay.
        kwargs: for the optimizer.
    """
    of_embeddings = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, Embedding)
        for parameter in layer.adapter_parameters()
    }
    of_norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    rest, embeddings, fast, fast_fixed = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in of_embeddings:
            embeddings.append(parameter)
        elif "lora_B" not in name and parameter.ndim != 1:
            rest.append(parameter)
        else:
            (fast_fixed if id(parameter) in of_norms or "bias" in name else fast).append(parameter)
    groups = [
        {"params": rest, "weight_decay": loraplus_weight_decay, "lr": lr},
        {"params": embeddings, "weight_decay": loraplus_weight_decay, "lr": loraplus_lr_embedding},
        {"params": fast, "weight_decay": loraplus_weight_decay, "lr": lr * loraplus_lr_ratio},
        {"params": fast_fixed, "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)
