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


class TutorialLinear(nn.Module):
    """A layer as the tutorials spell it out."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = nn.Module()
        self.lora.A = nn.Parameter(torch.empty(linear.in_features, rank))
        self.lora.B = nn.Parameter(torch.zeros(rank, linear.out_features))
        self.scale = alpha / rank

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.lora.A @ self.lora.B)


def test_same_names_values_and_gradients_as_the_tutorials_classes():
    """A checkpoint of the tutorials' model loads, and computes and trains alike."""
    linear, x = nn.Linear(7, 5), torch.randn(2, 3, 7)
    tutorial, ours = TutorialLinear(linear, 3, 6), LinearWithLoRA(nn.Linear(7, 5), 3, 6)
    nn.init.normal_(tutorial.lora.A)
    nn.init.normal_(tutorial.lora.B)
    assert not any(ours.load_state_dict(tutorial.state_dict()))
    results = [model(x) for model in (tutorial, ours)]
    torch.testing.assert_close(results[1], results[0])
    for result in results:
        result.square().sum().backward()
    for name in ("A", "B"):
        torch.testing.assert_close(getattr(ours.lora, name).grad, getattr(tutorial.lora, name).grad)


def test_the_tutorials_steps():
    """Count, freeze, replace, count again: only the factors are left to train, the model computes what it did."""
    model, x = tiny.mlp(), torch.randn(3, 11)
    before = model(x)
    for parameter in model.parameters():
        parameter.requires_grad = False
    replace_linear_with_lora(model, rank=4, alpha=4)
    torch.testing.assert_close(model(x), before)
    sizes = [(11, 23), (23, 11), (11, 5)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(4 * (n + k) for n, k in sizes)
    assert type(model.up) is LinearWithLoRA
    assert type(model.up.lora) is LoRALayer
    assert type(model.up.linear) is nn.Linear
