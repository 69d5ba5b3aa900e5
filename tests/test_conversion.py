"""PiSSA and OLoRA adapters as plain LoRA of the untouched base."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyqlora import LoraConfig, PeftModel, get_peft_model


def config(**changes):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["up", "down"], **changes})


def x():
    return torch.randn(4, 11, generator=torch.Generator().manual_seed(3))


def move(model):
    """As training would: every factor goes somewhere else."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 7}},
        {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"down": 7}},
    ],
)
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized")
@pytest.mark.parametrize("library", ["pyqlora", "peft"])
def test_converted_adapter_computes_the_same_on_the_plain_base(tmp_path, init, changes, library):
    reader = pytest.importorskip(library).PeftModel
    model = get_peft_model(tiny.mlp(), config(init_lora_weights=init, **changes))
    model.peft_config["default"].init_lora_weights = True  # for PEFT, which loads what it writes as the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    move(model)
    want = model(x())
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = reader.from_pretrained(tiny.mlp(), tmp_path / "end")
    torch.testing.assert_close(loaded(x()), want, rtol=1e-4, atol=1e-5)
    assert loaded.peft_config["default"].r == 4
    assert model.peft_config["default"].r == 2
    assert not torch.allclose(tiny.mlp()(x()), want, atol=1e-2)


def test_errors(tmp_path):
    model = get_peft_model(tiny.mlp(), config(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "pissa")
    other = get_peft_model(tiny.mlp(), config(init_lora_weights="pissa", r=3))
    with pytest.raises(ValueError, match="is not the start of this adapter: it differs in base_model"):
        other.save_pretrained(tmp_path / "o", path_initial_model_for_weight_conversion=tmp_path / "pissa")
    plain = get_peft_model(tiny.mlp(), config())
    with pytest.raises(ValueError, match="only works for converting a PiSSA"):
        plain.save_pretrained(tmp_path / "o", path_initial_model_for_weight_conversion=tmp_path / "pissa")
    dora = get_peft_model(tiny.mlp(), config(init_lora_weights="pissa", use_dora=True))
    with pytest.raises(ValueError, match="a DoRA adapter cannot be written"):
        dora.save_pretrained(tmp_path / "o", path_initial_model_for_weight_conversion=tmp_path / "pissa")


@pytest.mark.parametrize("first", ["pissa", True])
def test_a_second_adapter_beside_one_that_changed_the_base_is_said(tmp_path, first):
    for init in ("pissa", True):
        get_peft_model(tiny.mlp(), config(init_lora_weights=init)).save_pretrained(tmp_path / str(init))
    model = PeftModel.from_pretrained(tiny.mlp(), tmp_path / str(first))
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        model.load_adapter(tmp_path / str("pissa" if first is True else True), "other")
