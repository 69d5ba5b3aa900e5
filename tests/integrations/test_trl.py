"""TRL's recipe, unchanged, on pyqlora's objects: in a process of its own, where `peft` is the stand-in."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyqlora import BitsAndBytesConfig, PeftModel

MISSING = [package for package in ("trl", "datasets") if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SCRIPT = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from pyqlora import BitsAndBytesConfig, LoraConfig

base, out = sys.argv[1:]
turns = [[("user", f"{i} is"), ("assistant", f" in {i * 7}")] for i in range(16)]
train_dataset = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in t]} for t in turns])


def trainer(name):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")
    torch.manual_seed(0)
    return SFTTrainer(
        model,
        train_dataset=train_dataset,
        args=SFTConfig(
            output_dir=f"{out}/{name}",
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            optim="paged_adamw_8bit",
            gradient_checkpointing=True,
            max_length=64,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


whole, resumed = trainer("whole"), trainer("resumed")
assert type(whole.model).__module__ == "pyqlora.tasks", type(whole.model)
whole.train()
whole.save_model(f"{out}/adapter")
resumed.train(resume_from_checkpoint=f"{out}/whole/checkpoint-3")
whole.model.merge_and_unload().save_pretrained(f"{out}/merged")
json.dump([losses(whole), losses(resumed)], open(f"{out}/losses.json", "w"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory of the base model, directory of what the recipe wrote, what it printed)."""
    directory = tmp_path_factory.mktemp("trl")
    base = tiny_model.save(directory / "base")
    (directory / "recipe.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "pyqlora.compat", "recipe.py", str(base), str(directory)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return base, directory, done


def test_it_trains_and_resumes(run):
    whole, resumed = json.loads((run[1] / "losses.json").read_text())
    assert whole[-1] < 0.8 * whole[0]
    assert resumed[-3:] == whole[-3:]


def test_checkpoints_hold_the_adapter_alone(run):
    names = {path.name for path in (run[1] / "whole" / "checkpoint-6").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert "model.safetensors" not in names


@torch.no_grad()
def test_the_merged_model_is_the_adapted_one(run):
    base, directory, done = run
    assert "merge check: largest logit difference" in done.stderr
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")
    adapted = PeftModel.from_pretrained(model, directory / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged")
    assert not hasattr(merged.config, "quantization_config")
    inputs = AutoTokenizer.from_pretrained(base)("1 is in", return_tensors="pt")
    expected = adapted(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)  # float32 weights
