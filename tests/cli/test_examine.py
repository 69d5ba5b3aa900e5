from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny
import tiny_model
from safetensors.torch import load_file, save_file

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.cli.app import run

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def adapter(model, tmp_path):
    """Make an adapter; `change` edits its weights, keywords its config."""

    def adapter(change=None, trained=True, base=model, **config):
        config = {"target_modules": ["q_proj", "up_proj"], "r": 4, "task_type": "CAUSAL_LM", **config}
        adapted = get_peft_model(tiny_model.model(), LoraConfig(**config))
        if trained:
            tiny.randomize(adapted)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        weights = load_file(path)
        if change is not None:
            change(weights)
        save_file(weights, path)
        return str(tmp_path / "adapter")

    return adapter


def problems(capsys, *arguments) -> list[str]:
    """What the problems say, of a command that fails with their count."""
    assert run(["doctor", *arguments]) == 1
    printed = capsys.readouterr()
    found = re.findall(r"^problem  (.*)$", printed.out, re.MULTILINE)
    count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
    assert printed.err == f"error: {arguments[0]}: {count} with this adapter, listed above\n"
    return found


def test_a_good_adapter(adapter, model, capsys):
    assert run(["doctor", adapter(alpha_pattern={"up_proj": 2})]) == 0
    printed = capsys.readouterr().out
    assert "LoRA, r 4, alpha 8 (scale 2) on q_proj, up_proj; alpha_pattern {'up_proj': 2}; CAUSAL_LM" in printed
    assert "8 tensors, 2,304 parameters, float32, 0.00922 MB" in printed
    assert f"{model}, LlamaForCausalLM: every key and shape fits" in printed
    assert "ok: the adapter is whole, finite and trained" in printed


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}}], ids=str)
def test_norm_of_the_largest_update(adapter, capsys, config):
    path = adapter(**config)
    run(["doctor", path])
    norm, where = re.search(r"in the middle, (\S+) in (\S+)", capsys.readouterr().out).groups()
    merged = get_peft_model(tiny_model.model(), LoraConfig(target_modules=["q_proj", "up_proj"], r=4, **config))
    merged.load_adapter(path, "default")
    layer = merged.get_base_model().get_submodule(where)
    assert f"{float(layer.get_delta_weight('default').norm()):.2g}" == f"{float(norm):.2g}"


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_variants_fit_their_base(adapter, capsys, config):
    assert run(["doctor", adapter(**config)]) == 0, capsys.readouterr()


def test_an_untrained_adapter(adapter, capsys):
    (problem,) = problems(capsys, adapter(trained=False))
    assert problem.startswith("B is zero in all 4 layers, so the adapter changes nothing")


def test_some_zero(adapter, capsys):
    (problem,) = problems(capsys, adapter(lambda weights: weights[f"{Q}B.weight"].zero_()))
    assert problem == f"zero, so 1 of 4 layers change nothing (1): {Q}B.weight"


def test_weights_under_other_names_leave_b_zero_after_loading(adapter, capsys):
    def change(weights):
        for key in list(weights):
            weights[key.replace("base_model.model.", "module.")] = weights.pop(key)

    found = problems(capsys, adapter(change))
    assert [problem.partition(" (")[0] for problem in found[:2]] == [
        "missing, though the config asks for it",
        "in the file, but the model has no place for it",
    ]
    assert "(8): model.layers.0.self_attn.q_proj.lora_A.weight; " in found[0]
    assert found[0].endswith(" and 5 more")
    assert found[2].startswith("B is zero in all 4 layers")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(adapter, capsys, value):
    (problem,) = problems(capsys, adapter(lambda weights: weights[f"{Q}A.weight"][1].fill_(value)))
    assert problem == f"with NaN or infinity (1): {Q}A.weight"


def test_other_shapes(adapter, capsys):
    def change(weights):
        weights[f"{Q}B.weight"] = torch.ones(60, 4)

    (problem,) = problems(capsys, adapter(change))
    key = Q.removeprefix("base_model.model.")
    assert problem == f"of another shape than in the model (1): {key}B.weight [60, 4], in the model [64, 4]"


def test_another_base(adapter, tmp_path, capsys):
    tiny.llama().save_pretrained(tmp_path / "other")
    path = adapter()
    (problem,) = problems(capsys, path, "--model", str(tmp_path / "other"))
    assert problem.startswith("of another shape than in the model (8): ")


def test_a_base_without_the_targets(adapter, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    found = problems(capsys, adapter(), "--model", str(tmp_path / "gpt2"))
    assert found[0].startswith("the config does not fit the base model: ")


@pytest.mark.parametrize("base", [None, "nobody/knows-this-model"])
def test_without_the_base_the_file_alone_is_examined(adapter, capsys, base):
    path = adapter(base=base)
    config = Path(path, "adapter_config.json")
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "base_model_name_or_path": base}))
    assert run(["doctor", path]) == 0
    assert "--model MODEL compares the keys with one" in capsys.readouterr().out

    def change(weights):
        del weights[f"{Q}B.weight"]
        weights[f"{Q.replace('0', '1')}A.weight"] = torch.ones(5, 64)

    path = adapter(change, base=base)
    config.write_text(json.dumps({**text, "base_model_name_or_path": base}))
    assert problems(capsys, path) == [
        f"without its counterpart (A without B, or B without A) (1): {Q}A.weight",
        f"of another rank than the config's 4 (1): {Q.replace('0', '1')}A.weight [5, 64]",
    ]


def test_no_adapter(tmp_path, capsys):
    assert run(["doctor", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: Can't find 'adapter_config.json' at '{tmp_path}'\n"


def test_model_without_an_adapter(capsys):
    assert run(["doctor", "--model", "m"]) == 1
    assert "--model names an adapter's base model: pyqlora doctor ADAPTER --model MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_an_adapter_of_experts_from_transformers_4(tmp_path, capsys, kind):
    pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 does not stack experts")
    import test_experts

    test_experts.old_adapter(kind, tmp_path / "old", task_type="CAUSAL_LM")
    test_experts.base(kind).save_pretrained(tmp_path / "base")
    assert run(["doctor", str(tmp_path / "old"), "--model", str(tmp_path / "base")]) == 0
    printed = capsys.readouterr().out
    assert "on down_proj, gate, gate_up_proj, q_proj;" in printed and ": every key and shape fits" in printed
    assert "ok: the adapter is whole, finite and trained" in printed
    norm, where = re.search(r"in the middle, (\S+) in (\S+)", printed).groups()
    model = PeftModel.from_pretrained(test_experts.base(kind), tmp_path / "old").get_base_model()
    assert f"{float(model.get_submodule(where).get_delta_weight('default').norm()):.2g}" == f"{float(norm):.2g}"
