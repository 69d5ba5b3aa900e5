"""LoRA+: which parameter learns how fast."""

from __future__ import annotations

import torch
from torch import nn

from pyqlora import LoraConfig, get_peft_model
from pyqlora.loraplus import create_loraplus_optimizer
from pyqlora.optim import AdamW8bit


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.norm(self.table(x)))


def test_groups():
    model = get_peft_model(Small(), LoraConfig(target_modules=["table", "linear"], lora_bias=False, bias="all"))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4, loraplus_weight_decay=0.1, eps=1e-5
    )
    names = {id(parameter): name.removeprefix("base_model.model.") for name, parameter in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [
        ["linear.lora_A.default.weight"],
        ["table.lora_embedding_A.default", "table.lora_embedding_B.default"],
        ["linear.lora_B.default.weight"],
        ["norm.bias", "linear.base_layer.bias"],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-6, 4e-3, 4e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert optimizer.defaults["eps"] == 1e-5


def test_a_step_with_an_eight_bit_optimizer():
    model = get_peft_model(Small(), LoraConfig(target_modules=["linear"]))
    optimizer = create_loraplus_optimizer(model, AdamW8bit, lr=1e-3, loraplus_lr_ratio=4)
    b = model.base_model.model.linear.lora_B["default"].weight
    model(torch.arange(3)).sum().backward()
    optimizer.step()
    assert b.abs().max() > 3e-3


def test_a_model_without_adapters():
    optimizer = create_loraplus_optimizer(Small(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 0, 3]
