"""get_layer_status and get_model_status."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from pyqlora import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model


def build(get, config):
    model = get(tiny.mlp(), config(r=2, target_modules=["up"], modules_to_save=["head"]))
    model.add_adapter("other", config(r=2, target_modules=["up", "down"]))
    return model


def test_equals_peft():
    peft = pytest.importorskip("peft")
    theirs, ours = build(peft.get_peft_model, peft.LoraConfig), build(get_peft_model, LoraConfig)
    for change in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.base_model.disable_adapter_layers()):
        change(theirs)
        change(ours)
        for status, want in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
            want.module_type = status.module_type  # a wrapper's repr
            assert dataclasses.asdict(status) == dataclasses.asdict(want)
        assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())


def test_irregular():
    model = build(get_peft_model, LoraConfig)
    model.get_base_model().up.enable_adapters(False)
    status = get_model_status(model)
    assert status.enabled == "irregular"
    model.get_base_model().down.set_adapter("other")
    assert get_model_status(model).active_adapters == "irregular"
    model.get_base_model().up.enable_adapters(True)
    model.get_base_model().up.merge(adapter_names=["other"])
    assert get_model_status(model).merged_adapters == "irregular"
    model.get_base_model().up.lora_A["default"].requires_grad_(False)
    assert get_model_status(model).requires_grad["default"] == "irregular"


def test_injected_and_quantized_and_none():
    status = get_model_status(inject_adapter_in_model(LoraConfig(target_modules=["up"]), tiny.mlp_4bit()))
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    assert status.quantization_backend == "bnb 4bit"
    with pytest.raises(ValueError, match="No adapter layers found"):
        get_layer_status(tiny.mlp())
