"""The small classes for plain models."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from pyqlora import LinearWithLoRA, LoRALayer, replace_linear_with_lora


def test_layer_is_the_product():
    layer = LoRALayer(7, 5, rank=3, alpha=6)
    x = torch.randn(2, 4, 7)
    assert torch.equal(layer(x), torch.zeros(2, 4, 5))
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), 2 * x @ layer.A @ layer.B)
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        LoRALayer(7, 5, rank=0, alpha=6)


@pytest.mark.parametrize("make", [tiny.mlp, tiny.mlp_4bit])
def test_replaced_model_starts_equal_and_trains_only_factors(make):
    x = torch.randn(3, 11)
    model = replace_linear_with_lora(make(), rank=4, alpha=8)
    torch.testing.assert_close(model(x), make()(x))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_replacing_a_single_layer_and_none():
    assert isinstance(replace_linear_with_lora(nn.Linear(3, 2), 2, 2), LinearWithLoRA)
    with pytest.raises(ValueError, match=r"has no nn.Linear"):
        replace_linear_with_lora(nn.Sequential(nn.ReLU()), 2, 2)
