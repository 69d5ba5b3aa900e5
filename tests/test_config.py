"""LoraConfig and its file."""

from __future__ import annotations

import json

import pytest

from pyqlora import EvaConfig, LoftQConfig, LoraConfig, PeftConfig, TaskType, get_peft_config


def test_round_trip(tmp_path):
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["v_proj", "q_proj"],
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        rank_pattern={"up": 4},
        modules_to_save=["head"],
        use_rslora=True,
    )
    config.save_pretrained(tmp_path)
    for kind in (LoraConfig, PeftConfig):
        read = kind.from_pretrained(tmp_path)
        assert type(read) is LoraConfig and read.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("kwargs", [{}, {"r": 4, "target_modules": ["a"]}, {"target_modules": "all-linear"}])
def test_file_is_the_one_peft_writes(tmp_path, kwargs):
    peft = pytest.importorskip("peft")
    for name, kind in (("ours", LoraConfig), ("theirs", peft.LoraConfig)):
        kind(**kwargs).save_pretrained(tmp_path / name)
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()
    assert LoraConfig.from_pretrained(tmp_path / "theirs").to_dict() == LoraConfig(**kwargs).to_dict()
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").r == LoraConfig(**kwargs).r


def write(path, **values):
    path.joinpath("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **values}))


def test_unknown_inactive_keys_are_ignored_with_one_warning(tmp_path):
    write(tmp_path, new_switch=False, new_list=[], new_thing=None)
    with pytest.warns(UserWarning) as seen:
        assert LoraConfig.from_pretrained(tmp_path).r == 2
    assert [str(w.message) for w in seen] == [
        "ignoring unknown but inactive keys of the adapter config: new_list, new_switch, new_thing"
    ]


def test_unknown_active_keys_are_refused(tmp_path):
    write(tmp_path, new_switch=True, other=False)
    with pytest.raises(ValueError, match="new_switch=True: pyqlora does not know this setting"):
        LoraConfig.from_pretrained(tmp_path)


def test_runtime_config_is_not_read(tmp_path):
    write(tmp_path, runtime_config={"ephemeral_gpu_offload": True})
    with pytest.warns(UserWarning, match="runtime_config"):
        assert not LoraConfig.from_pretrained(tmp_path).runtime_config.ephemeral_gpu_offload


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'"),
        ({"alora_invocation_tokens": [1]}, "does not have Activated LoRA"),
        ({"arrow_config": {"top_k": 1}}, "does not have Arrow"),
        ({"kasa_config": 1}, "KaSA"),
        ({"use_bdlora": 1}, "BD-LoRA"),
        ({"velora_config": 1}, "VeLoRA"),
        ({"monteclora_config": 1}, "Monte-Carlo"),
        ({"init_lora_weights": "mica"}, "MiCA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"target_modules": "a|b", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": "a|b", "layers_pattern": "x"}, "`layers_pattern` cannot be used"),
        ({"layers_pattern": "x"}, "`layers_to_transform` must also be specified"),
        ({"init_lora_weights": "loftq"}, "`loftq_config` must be specified"),
        ({"lora_bias": True, "use_dora": True}, "not supported for DoRA"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True is only supported"),
    ],
)
def test_errors(kwargs, text):
    with pytest.raises(ValueError, match=text):
        LoraConfig(**kwargs)


def test_a_config_from_a_dict():
    made = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["up"], "task_type": "CAUSAL_LM"})
    assert made == LoraConfig(r=3, target_modules=["up"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="peft_type=PREFIX_TUNING"):
        get_peft_config({"peft_type": "PREFIX_TUNING"})


def test_other_methods_are_refused_by_name(tmp_path):
    write(tmp_path, peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type=IA3"):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at '[^']*'$"):
        PeftConfig.from_pretrained(tmp_path)
    for name in ("nowhere", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"nowhere': there is no such directory$"):
            PeftConfig.from_pretrained(name)
    with pytest.raises(ValueError, match=r"at '.*inner': there is no such directory$"):
        PeftConfig.from_pretrained(tmp_path, subfolder="inner")
    with pytest.raises(ValueError, match=r"'runs/poet': there is no such directory, and it is not in the hub's cache"):
        PeftConfig.from_pretrained("runs/poet", local_files_only=True)
    tmp_path.joinpath("file").touch()
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        LoraConfig().save_pretrained(tmp_path / "file")


def test_target_parameters_must_be_a_list():
    with pytest.raises(TypeError, match="must be a list of strings"):
        LoraConfig(target_parameters="experts.w1")


def test_sub_configs():
    assert LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig()).loftq_config == {
        "loftq_bits": 4,
        "loftq_iter": 1,
    }
    with pytest.warns(UserWarning, match="Using default EVA config"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(UserWarning, match=r"`eva_config` specified but will be ignored"):
        LoraConfig(eva_config={"rho": 1.5})
    with pytest.warns(UserWarning, match=r"`loftq_config` specified but will be ignored"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}
    with pytest.raises(ValueError, match=r"`rho` must be >= 1.0"):
        EvaConfig(rho=0.5)
    with pytest.raises(ValueError, match=r"`tau` must be between"):
        EvaConfig(tau=2)


def test_task_types():
    assert LoraConfig(task_type=TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"
    assert not LoraConfig().is_prompt_learning and not LoraConfig().is_adaption_prompt
