"""Adapters of every variant on every kind of layer: written by either package, read by the other, equal outputs."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from torch import nn

import pyqlora
from pyqlora import LoraConfig, get_peft_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


class Kinds(nn.Module):
    """One layer of each kind, in a row."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table = nn.Embedding(13, 12)
        self.conv1 = nn.Conv1d(6, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), groups=1)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.linear = nn.Linear(14, 6)
        self.turned = Conv1D(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.conv3(self.conv2(self.conv1(self.table(tokens))[:, None])[:, None])
        x = self.turned(self.linear(x.flatten(3).flatten(1, 2)[..., :14]))
        return self.head(self.attention(x, x, x)[0])


LINEAR = ["linear", "turned", "head"]
CONVOLUTIONS = ["conv1", "conv2", "conv3"]
CONFIGS = {
    "plain": {"target_modules": ["table", *CONVOLUTIONS, *LINEAR]},
    # PEFT takes a Conv1D beside it to mean that attention is transposed, too.
    "attention": {"target_modules": ["linear", "attention"]},
    "rslora": {"target_modules": ["table", *CONVOLUTIONS, *LINEAR], "use_rslora": True},
    "dora": {"target_modules": ["table", *CONVOLUTIONS, *LINEAR], "use_dora": True},
    "lora_bias": {"target_modules": [*CONVOLUTIONS, *LINEAR], "lora_bias": True},
    "biases": {"target_modules": LINEAR, "bias": "all"},
    "biases of layers": {"target_modules": LINEAR, "bias": "lora_only"},
    "ranks": {"target_modules": LINEAR, "rank_pattern": {"linear": 3}, "alpha_pattern": {"head": 7}},
    "parameter": {"target_modules": ["table"], "target_parameters": ["linear.weight"]},
    "whole modules": {"target_modules": ["linear"], "modules_to_save": ["head", "conv1"]},
    "tokens": {"target_modules": ["linear"], "trainable_token_indices": {"table": [1, 5]}},
    "gaussian": {"target_modules": [*CONVOLUTIONS, *LINEAR], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "pissa": {"target_modules": LINEAR, "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["linear", "head"], "init_lora_weights": "olora"},
    "eva": {"target_modules": LINEAR, "init_lora_weights": "eva"},
}


def kinds():
    torch.manual_seed(0)
    return Kinds()


def tokens():
    return torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("writer", ["pyqlora", "peft"])
@pytest.mark.filterwarnings("ignore")
def test_either_reads_what_the_other_wrote(tmp_path, kind, writer):
    ours_writes = writer == "pyqlora"
    library, other = (pyqlora, peft) if ours_writes else (peft, pyqlora)
    options = {"r": 2, "lora_alpha": 3, **CONFIGS[kind]}
    model = library.get_peft_model(kinds(), library.LoraConfig(**options)).eval()
    tiny.randomize(model)
    want = model(tokens())
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found (missing|unexpected)")
        loaded = other.PeftModel.from_pretrained(kinds(), tmp_path)
    torch.testing.assert_close(loaded(tokens()), want, rtol=1e-4, atol=2e-5)


def test_loftq_adapter_with_the_base_that_it_left(tmp_path):
    """LoftQ is read as plain LoRA of the rounded base, which is to be kept: PEFT's own rounds otherwise."""
    pytest.importorskip("scipy")  # PEFT asks for it
    options = {"target_modules": ["linear", "head"], "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    model = get_peft_model(kinds(), LoraConfig(r=2, **options)).eval()
    tiny.randomize(model)
    want = model(tokens())
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.init_lora_weights == "loftq"
    config.init_lora_weights = True
    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path, config=config)
    torch.testing.assert_close(loaded(tokens()), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("writer", ["pyqlora", "peft"])
def test_replicated_layers(tmp_path, writer):
    library, other = (pyqlora, peft) if writer == "pyqlora" else (peft, pyqlora)
    config = library.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False)
    model = library.get_peft_model(tiny.llama(), config).eval()
    model.save_pretrained(tmp_path)
    loaded = other.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_dtypes_of_a_whole_model_in_training_evaluation_and_generation(tmp_path, dtype, widen, dora):
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    model = get_peft_model(tiny.llama(dtype), config, autocast_adapter_dtype=widen)
    adapters = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert adapters == {torch.float32 if widen else dtype}
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model.train()(tokens(), labels=tokens())
            output.loss.backward()
            assert model.eval()(tokens()).logits.dtype == (torch.bfloat16 if autocast else dtype)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False).shape == (2, 8)


def test_initial_values_depend_on_the_seed_alone():
    """Whatever was drawn or built before."""
    values = []
    for other in (False, True):
        if other:
            torch.randn(5)
            get_peft_model(kinds(), LoraConfig(target_modules=["head"]))
        base = kinds()
        torch.manual_seed(3)
        values.append(get_peft_model(base, LoraConfig(r=2, target_modules=LINEAR)).state_dict())
    assert all(torch.equal(value, values[1][key]) for key, value in values[0].items())
