"""AutoPeftModel…: base model and adapter from the adapter's directory."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyqlora import AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, LoraConfig, get_peft_model
from pyqlora.tasks import PeftModelForCausalLM

transformers = pytest.importorskip("transformers")


def saved(path, task_type):
    tiny.llama().save_pretrained(path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(path / "base")
    model = get_peft_model(base, LoraConfig(task_type=task_type, init_lora_weights=False)).eval()
    model.save_pretrained(path / "adapter")
    return model


def test_by_task(tmp_path):
    model = saved(tmp_path, "CAUSAL_LM")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is PeftModelForCausalLM
    ids = torch.randint(1, 64, (1, 5))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="with a task type"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


def test_by_class_name(tmp_path):
    model = saved(tmp_path, None)
    ids = torch.randint(1, 64, (1, 5))
    assert torch.equal(AutoPeftModel.from_pretrained(tmp_path / "adapter")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["elsewhere"])


def test_not_to_be_made():
    with pytest.raises(OSError, match="designed to be instantiated using"):
        AutoPeftModelForCausalLM()
