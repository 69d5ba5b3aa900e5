"""transformers' own add_adapter, load_adapter and set_adapter, which call peft, on the stand-in: in its own process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model

SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig
import pyqlora

assert LoraConfig is pyqlora.LoraConfig
ids = torch.arange(3, 30).reshape(1, -1)


def base():
    return AutoModelForCausalLM.from_pretrained("base")


@torch.no_grad()
def logits(model):
    return model.eval()(ids).logits


def config(**changes):
    return LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 4, "init_lora_weights": False, **changes})

model = base()
plain = logits(model)
model.add_adapter(config(), "one")
model.add_adapter(config(r=2, lora_alpha=3), "two")
assert model.active_adapters() == ["two"]
two = logits(model)
model.save_pretrained("two")
model.set_adapter("one")
one = logits(model)
model.save_pretrained("one")
model.disable_adapters()
assert torch.equal(logits(model), plain)
model.enable_adapters()
assert torch.equal(logits(model), one)
model.set_adapter(["one", "two"])
both = logits(model)
assert len({float(x.sum()) for x in (plain, one, two, both)}) == 4

loaded = base()
loaded.load_adapter("one", adapter_name="first")
assert torch.equal(logits(loaded), one)
loaded.load_adapter("two", adapter_name="second")
loaded.set_adapter("second")
assert torch.equal(logits(loaded), two)
loaded.set_adapter("first")
assert torch.equal(logits(loaded), one)
loaded.delete_adapter("first")
assert list(loaded.peft_config) == ["second"] and torch.equal(logits(loaded), two)

trained = base()
trained.load_adapter("one", adapter_name="one", is_trainable=True)
assert sum(p.requires_grad for p in trained.parameters()) == 8
assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("one")), one)
assert torch.equal(logits(pyqlora.PeftModel.from_pretrained(base(), "one")), one)
for changes in (
    {"use_dora": True},
    {"use_rslora": True},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"trainable_token_indices": [3, 4]},
):
    model = base()
    model.add_adapter(config(**changes), "one")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.save_pretrained("saved")
    loaded = base()
    loaded.load_adapter("saved", adapter_name="other")
    assert torch.equal(logits(loaded), logits(model)), changes
"""


def test_adapters_on_a_transformers_model(tmp_path):
    tiny_model.save(tmp_path / "base")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "pyqlora.compat", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


OLD_SCRIPT = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("base")
found = model.load_adapter("old")
assert not found.missing_keys and not found.unexpected_keys and not found.mismatched_keys, found
with torch.no_grad():
    torch.save(model(torch.load("ids")).logits, "logits")
"""


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_an_adapter_of_experts_from_transformers_4(tmp_path, kind):
    pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 does not stack experts")
    import test_experts

    weights = test_experts.old_adapter(kind, tmp_path / "old")
    test_experts.base(kind).save_pretrained(tmp_path / "base")
    torch.save(test_experts.IDS, tmp_path / "ids")
    (tmp_path / "script.py").write_text(OLD_SCRIPT)
    command = [sys.executable, "-m", "pyqlora.compat", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = test_experts.logits(test_experts.updated(kind, weights))
    test_experts.close(torch.load(tmp_path / "logits"), expected)
