"""EVA: PEFT's components, ranks and configuration; what it refuses."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from pyqlora import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from pyqlora.eva import IncrementalPCA

pytest.importorskip("transformers")


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def config(library=None, targets=ALL, **eva):
    kind, options = (LoraConfig, EvaConfig) if library is None else (library.LoraConfig, library.EvaConfig)
    return kind(
        r=3,
        lora_alpha=6,
        target_modules=list(targets),
        init_lora_weights="eva",
        eva_config=options(**{"tau": 0.9, **eva}),
    )


def batches(count=3, rows=8, length=24):
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 60, (rows, length), generator=made) for _ in range(count)]
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 5:] = 0
    labels = [batch.masked_fill(batch % 7 == 0, -100) for batch in ids]
    return [
        {"input_ids": batch, "attention_mask": mask, "labels": label} for batch, label in zip(ids, labels, strict=True)
    ]


# PEFT whitens the components of layers that share an input once for each of them: not with such layers here.
@pytest.mark.parametrize(("whiten", "targets"), [(False, ALL), (True, ("q_proj", "o_proj", "down_proj"))])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_values_ranks_and_config_are_pefts(tmp_path, rho, whiten, targets):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny.llama(), config(peft, targets, rho=rho, whiten=whiten))
    ours = get_peft_model(tiny.llama(), config(None, targets, rho=rho, whiten=whiten))
    peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    initialize_lora_eva_weights(ours, batches(), show_progress_bar=False)
    expected = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    found = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys()
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)
    ours.save_pretrained(tmp_path)
    for library in (PeftModel, peft.PeftModel):
        loaded = library.from_pretrained(tiny.llama(), tmp_path)
        torch.testing.assert_close(loaded(**batches()[0]).logits, ours(**batches()[0]).logits)


def test_starts_at_the_base_model_and_leaves_it_in_training_mode():
    base = tiny.llama()(**batches()[0]).logits
    model = get_peft_model(tiny.llama(), config()).train()
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    assert model.training and sum(layer.r["default"] for layer in model.base_model.lora_layers()) == 2 * 5 * 3
    torch.testing.assert_close(model.eval()(**batches()[0]).logits, base)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_before_the_model_is_adapted():
    state = get_eva_state_dict(tiny.llama(), batches(), config(), show_progress_bar=False)
    model = get_peft_model(tiny.llama(), config())
    initialize_lora_eva_weights(model, eva_state_dict={f"base_model.model.{name}": a for name, a in state.items()})
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            torch.testing.assert_close(layer.lora_A["default"].weight, state[name.removeprefix("base_model.model.")])


def test_progress_is_said(capsys):
    get_eva_state_dict(tiny.llama(), batches(), config())
    assert "EVA: " in capsys.readouterr().err


def test_incremental_components_are_those_of_all_rows():
    rows = torch.randn(120, 9, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 10)
    pca = IncrementalPCA(4, 0.99)
    for batch in rows.split(30):
        pca.add(batch)
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).double().T.cov())
    torch.testing.assert_close(pca.explained(4), (values.flip(0) / values.sum())[:4], rtol=0.05, atol=0)
    similarity = (pca.components * vectors.flip(1).T[:4]).sum(1).abs()
    assert (similarity[:2] > 0.98).all()
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(4).double())
    pca.add(rows[:3])  # fewer rows than components
    assert pca.seen == 120


def test_other_layer_inputs():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7))
    made = [torch.randn(20, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    plain = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva", eva_config=EvaConfig(tau=0.5))
    run = lambda model, batch: model(batch)  # noqa: E731
    options = {"forward_fn": run, "prepare_model_inputs_fn": None, "show_progress_bar": False}
    state = get_eva_state_dict(model, made, plain, prepare_layer_inputs_fn=None, **options)
    assert sum(map(len, state.values())) == 4
    named = {"0": lambda given, batch, name: given[0]}
    same = get_eva_state_dict(model, made, plain, prepare_layer_inputs_fn=named, **options)
    assert all(torch.equal(state[name], same[name]) for name in state)
    with pytest.raises(ValueError, match="no adapted layers"):
        get_eva_state_dict(model, made, plain, prepare_layer_inputs_fn={"2": run}, **options)
    with pytest.raises(TypeError, match="batches that are dicts"):
        get_eva_state_dict(model, made, plain, forward_fn=run)


def test_what_is_refused():
    quiet = {"show_progress_bar": False}
    with pytest.raises(ValueError, match="peft_config is required"):
        get_eva_state_dict(tiny.llama(), batches())
    with pytest.raises(ValueError, match="dataloader is empty"):
        get_eva_state_dict(tiny.llama(), [], config())
    with pytest.raises(ValueError, match="lower r or rho"):
        get_eva_state_dict(tiny.llama(), batches(), config(rho=30.0), **quiet)
    with pytest.raises(ValueError, match="use larger batches"):
        get_eva_state_dict(tiny.llama(), batches(rows=1, length=5), config(), **quiet)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        initialize_lora_eva_weights(tiny.llama(), batches())
    with pytest.raises(ValueError, match="dataloader is required"):
        initialize_lora_eva_weights(get_peft_model(tiny.llama(), config()))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])), batches())
