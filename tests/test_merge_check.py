from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny
import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyqlora import BitsAndBytesConfig, LoraConfig, get_peft_model, merge_check

LINE = r"merge check: largest logit difference \S+ \(logits reach \S+\), top-1 agreement \d+\.\d% of \d+ tokens\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("model"))


def adapted(directory, **kwargs):
    kwargs.setdefault("quantization_config", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    base = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tiny.randomize(model)
    return model


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("adapters", [None, ["other"]])
def test_merging_a_4_bit_model_prints_a_check(directory, capsys, requantize, adapters):
    model = adapted(directory)
    model.add_adapter("other", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if adapters:
        model.set_adapter(adapters)
    before = merge_check.logits(model, tokenizer)
    model.set_adapter("default")
    capsys.readouterr()
    merged = model.merge_and_unload(adapter_names=adapters, requantize=requantize)
    printed = capsys.readouterr()
    expected = merge_check.compare(before, merge_check.logits(merged, tokenizer))
    assert re.fullmatch(LINE, printed.err)
    assert printed.err == f"merge check: {expected}\n"
    assert printed.out == ""
    # float32 weights merge without loss; requantized ones are 4 bits again
    assert (expected.largest > 0.01) is requantize


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_no_check_without_4_bits_or_tokenizer(directory, tmp_path, capsys):
    adapted(directory, quantization_config=None).merge_and_unload()
    tiny_model.model().save_pretrained(tmp_path)
    adapted(tmp_path).merge_and_unload()
    model = adapted(directory)
    model.merge_adapter()
    model.merge_and_unload()  # nothing left to compare with
    assert "merge check" not in capsys.readouterr().err


def test_comparison():
    before = [torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.0, -5.0, 0.5]])]
    after = [torch.tensor([[0.0, 2.5, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.0, -5.0, 0.5]])]
    check = merge_check.compare(before, after)
    assert check == (1.5, 5.0, 2 / 3, 3)
    assert str(check) == "largest logit difference 1.5 (logits reach 5), top-1 agreement 66.7% of 3 tokens"


def test_training_mode_stays(directory):
    model = adapted(directory).train()
    merge_check.logits(model, AutoTokenizer.from_pretrained(directory))
    assert model.training
