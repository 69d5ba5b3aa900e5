"""Adapter weights in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pyqlora import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)


def model(**kwargs):
    made = get_peft_model(tiny.mlp(), LoraConfig(**{"r": 4, "target_modules": ["up"], **kwargs}))
    tiny.randomize(made)
    return made


def edit(path, change):
    weights = load_file(path / "adapter_model.safetensors")
    change(weights)
    save_file(weights, path / "adapter_model.safetensors")


def test_keys_have_no_adapter_name(tmp_path):
    made = model(modules_to_save=["head"], use_dora=True)
    made.save_pretrained(tmp_path)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    prefix = "base_model.model."
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"{prefix}up.lora_A.weight",
        f"{prefix}up.lora_B.weight",
        f"{prefix}up.lora_magnitude_vector",
        f"{prefix}head.weight",
        f"{prefix}head.bias",
    }
    weights = load_peft_weights(tmp_path)
    assert torch.equal(weights[f"{prefix}up.lora_A.weight"], made.base_model.model.up.lora_A["default"].weight)


@pytest.mark.parametrize("bias, count", [("none", 0), ("all", 4), ("lora_only", 1)])
def test_biases_are_saved_as_asked(bias, count):
    state = get_peft_model_state_dict(model(bias=bias))
    assert sum(key.endswith("bias") for key in state) == count


def test_further_adapters_lie_in_folders(tmp_path):
    made = model()
    made.add_adapter("other", LoraConfig(r=2, target_modules=["down"]))
    made.save_pretrained(tmp_path)
    assert (tmp_path / "other/adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(tiny.mlp(), tmp_path)
    again.load_adapter(tmp_path / "other", "second")
    assert set(again.peft_config) == {"default", "second"} and again.active_adapter == "default"
    made.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one/adapter_config.json").exists()
    assert PeftModel.from_pretrained(tiny.mlp(), tmp_path / "one", subfolder="other").peft_config["default"].r == 2
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        made.save_pretrained(tmp_path, selected_adapters=["nobody"])


def test_missing_and_unexpected_keys_are_listed(tmp_path):
    model().save_pretrained(tmp_path)
    edit(
        tmp_path,
        lambda w: w.update({"base_model.model.elsewhere.lora_A.weight": w.pop("base_model.model.up.lora_A.weight")}),
    )
    with pytest.warns(UserWarning) as seen:
        made = PeftModel.from_pretrained(tiny.mlp(), tmp_path)
    texts = [str(w.message) for w in seen]
    assert any("missing adapter keys" in t and "base_model.model.up.lora_A.default.weight" in t for t in texts)
    assert any("unexpected keys" in t and "base_model.model.elsewhere.lora_A.weight" in t for t in texts)
    with pytest.warns(UserWarning):
        result = made.load_adapter(tmp_path, "default")
    assert result.missing_keys == ["base_model.model.up.lora_A.default.weight"]
    assert result.unexpected_keys == ["base_model.model.elsewhere.lora_A.weight"]


def test_misshapen_keys_are_refused_or_skipped(tmp_path):
    model().save_pretrained(tmp_path)
    edit(tmp_path, lambda w: w.update({k: v[:3].contiguous() for k, v in w.items() if "lora_A" in k}))
    with pytest.raises(
        RuntimeError, match=r"size mismatch for 1 parameters.*\n.*lora_A.*\(3, 11\) in the file, \(4, 11\)"
    ):
        PeftModel.from_pretrained(tiny.mlp(), tmp_path)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        PeftModel.from_pretrained(tiny.mlp(), tmp_path, ignore_mismatched_sizes=True)


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    made = model()
    made.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    files = sorted(tmp_path.iterdir())

    def full(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    tiny.randomize(made, 5)
    with pytest.raises(OSError, match="no space"):
        made.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


def test_pickles_are_neither_written_nor_read(tmp_path):
    with pytest.raises(ValueError, match="would write a pickle"):
        model().save_pretrained(tmp_path, safe_serialization=False)
    LoraConfig().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_peft_weights(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    model().save_pretrained(tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged, .* fetch or save it again"):
        load_peft_weights(tmp_path)


def test_paths_that_are_wrong(tmp_path):
    with pytest.raises(ValueError, match="Can't find weights"):
        load_peft_weights(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="should be a directory"):
        model().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        get_peft_model_state_dict(model(), adapter_name="x")


def test_state_dict_round_trip_and_given_state():
    made = model()
    state = {key: value.clone() for key, value in get_peft_model_state_dict(made).items()}
    gathered = {key: value * 2 for key, value in made.state_dict().items()}
    doubled = get_peft_model_state_dict(made, state_dict=gathered)
    assert all(torch.equal(doubled[key], 2 * value) for key, value in state.items())
    assert set_peft_model_state_dict(made, doubled).missing_keys == []
    assert torch.equal(made.base_model.model.up.lora_A["default"].weight, doubled["base_model.model.up.lora_A.weight"])


def test_key_mapping(tmp_path):
    model().save_pretrained(tmp_path)
    edit(tmp_path, lambda w: w.update({k.replace(".up.", ".old."): w.pop(k) for k in list(w)}))
    made = PeftModel.from_pretrained(tiny.mlp(), tmp_path, key_mapping={"^old": "up"})
    x = torch.randn(2, 11)
    assert torch.equal(made(x), model()(x))


def test_unsharded_tensors_are_reported():
    made = model()
    made.base_model.model.up.lora_A["default"].weight.data = torch.empty(0)
    with pytest.warns(UserWarning, match=r"1 LoRA tensor\(s\) have invalid shape"):
        get_peft_model_state_dict(made)
