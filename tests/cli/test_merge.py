from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import tiny
import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyqlora import BitsAndBytesConfig, LoraConfig, PeftModel, get_peft_model
from pyqlora.cli.app import run
from pyqlora.finetune.load import pick_device

CHECK = r"check    against the unmerged model: largest logit difference \S+ \(logits reach \S+\), top-1 agreement "


def save_adapter(path, **config):
    model = get_peft_model(
        tiny_model.model(), LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
    )
    tiny.randomize(model)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(model, adapter)."""
    directory = tmp_path_factory.mktemp("merge")
    return str(tiny_model.save(directory / "model")), save_adapter(directory / "adapter")


@pytest.mark.parametrize("base", ["dequantized", "original"])
@torch.no_grad()
def test_the_result_loads_in_plain_transformers(places, tmp_path, capsys, base):
    model, adapter = places
    out = tmp_path / "out"
    assert run(["merge", model, adapter, "-o", str(out), "--base", base]) == 0
    printed = capsys.readouterr().out
    assert re.search(CHECK, printed)
    assert ("against the 4-bit model with the adapter" in printed) == (base == "original")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantization = {"quantization_config": config} if base == "dequantized" else {}
    device, dtype = pick_device()  # which is also what the weights are quantized from
    unmerged = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map={"": device}, **quantization)
    unmerged = PeftModel.from_pretrained(unmerged, adapter)
    inputs = AutoTokenizer.from_pretrained(out)("in a in 123", return_tensors="pt").to(unmerged.device)
    expected, got = unmerged(**inputs).logits, merged.float().to(unmerged.device)(**inputs).logits
    # bfloat16 keeps 8 bits of each weight and of everything else in the model, over two layers; on a GPU of each
    # activation too
    assert (got - expected).abs().max() < (2**-6 if dtype is torch.float32 else 2**-5) * expected.abs().max()


def test_the_adapters_tokenizer_goes_along(places, tmp_path):
    model, _ = places
    adapter = save_adapter(tmp_path / "adapter")
    tiny_model.tokenizer("{{ 'its own' }}").save_pretrained(adapter)
    assert run(["merge", model, adapter, "-o", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'its own' }}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "4bit"], "--base '4bit' is not known, expected dequantized or original"),
        (["--gguf", "q2"], "--gguf 'q2' is not known, expected f16 or q8_0"),
    ],
)
def test_unknown_options(places, tmp_path, capsys, options, message):
    assert run(["merge", *places, "-o", str(tmp_path / "out"), *options]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def fails(capsys, *arguments) -> str:
    """The one line on stderr of a command that leaves nothing behind."""
    capsys.readouterr()  # what loading in the test has printed
    assert run(["merge", *map(str, arguments)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_out_must_be_empty(places, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        assert "exists and is not an empty directory" in fails(capsys, *places, "-o", out)
    assert "Missing option '-o'" in fails(capsys, *places)


def test_no_model_or_adapter(places, tmp_path, capsys):
    model, adapter = places
    out = tmp_path / "out"
    assert "no such model directory or .gguf file" in fails(capsys, tmp_path / "no", adapter, "-o", out)
    assert "adapter_config.json" in fails(capsys, model, tmp_path, "-o", out)
    assert not out.exists()


def test_an_adapter_of_another_model(places, tmp_path, capsys):
    wide = get_peft_model(tiny.llama(), LoraConfig(target_modules=["up_proj"]))
    wide.save_pretrained(tmp_path / "wide")
    message = fails(capsys, places[0], tmp_path / "wide", "-o", tmp_path / "out")
    assert "this adapter does not fit the model" in message
    assert "size mismatch" in message
    mlp = get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"]))
    mlp.save_pretrained(tmp_path / "mlp")
    assert "does not fit the model" in fails(capsys, places[0], tmp_path / "mlp", "-o", tmp_path / "out")


def test_an_adapter_with_nan_is_refused(places, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "adapter")
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{adapter}/adapter_model.safetensors")
    next(iter(weights.values())).fill_(torch.nan)
    save_file(weights, f"{adapter}/adapter_model.safetensors")
    assert "NaNs detected in the merged weights" in fails(capsys, places[0], adapter, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_has_no_original_weights(places, tmp_path, capsys):
    model, adapter = places
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(tmp_path / "4bit")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "4bit")
    out = tmp_path / "out"
    message = fails(capsys, tmp_path / "4bit", adapter, "-o", out, "--base", "original")
    assert "these files are quantized already; the original weights are not there" in message
    assert run(["merge", str(tmp_path / "4bit"), adapter, "-o", str(out)]) == 0
