"""Which modules a config selects."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from pyqlora import LoraConfig, get_peft_model
from pyqlora.inject import EXCLUDED, NoMatchingPeftModuleError, match, pattern_value
from pyqlora.lora_layer import LoraLayer


class Blocks(nn.Module):
    """Names like those of a transformer, with a numbered list inside a numbered list."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"q": nn.Linear(3, 3), "experts": nn.ModuleList([nn.Linear(3, 3)] * 1)})  # noqa: E731
        self.layers = nn.ModuleList([block() for _ in range(3)])
        self.q = nn.Linear(3, 3)


def adapted(model: nn.Module, **kwargs) -> set[str]:
    model = get_peft_model(model, LoraConfig(r=2, **kwargs))
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    "kwargs, names",
    [
        ({"target_modules": ["up"]}, {"up"}),
        ({"target_modules": ["up", "head"]}, {"up", "head"}),
        ({"target_modules": "up|do.*"}, {"up", "down"}),
        ({"target_modules": "all-linear"}, {"up", "down", "head"}),
        ({"target_modules": "All-Linear", "exclude_modules": ["head"]}, {"up", "down"}),
        ({"target_modules": ["up", "down"], "exclude_modules": "d.*"}, {"up"}),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, {"up", "down"}),
    ],
)
def test_selection(kwargs, names):
    assert adapted(tiny.mlp(), **kwargs) == names


@pytest.mark.parametrize(
    "kwargs, names",
    [
        ({"target_modules": ["q"]}, {"q", "layers.0.q", "layers.1.q", "layers.2.q"}),
        ({"target_modules": ["layers.1.q"]}, {"layers.1.q"}),
        ({"target_modules": ["q"], "layers_to_transform": 1}, {"layers.1.q"}),
        ({"target_modules": ["q"], "layers_to_transform": [0, 2]}, {"layers.0.q", "layers.2.q"}),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"q", "layers.0.q"}),
        ({"target_modules": ["0"], "layers_to_transform": [1], "layers_pattern": ["layers"]}, {"layers.1.experts.0"}),
    ],
)
def test_layers(kwargs, names):
    if "layers_pattern" not in kwargs and "layers_to_transform" in kwargs:
        model = nn.ModuleDict({"model": Blocks()})  # without a pattern a prefix before the list is needed
        names = {f"model.{name}" for name in names}
    else:
        model = Blocks()
    assert adapted(model, **kwargs) == names


def test_all_linear_spares_the_output_head():
    pytest.importorskip("transformers")
    names = adapted(tiny.llama(), target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_default_targets_by_model_type():
    pytest.importorskip("transformers")
    assert {name.rpartition(".")[2] for name in adapted(tiny.llama())} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"Please specify `target_modules`.*'custom'"):
        adapted(tiny.mlp())


def test_default_targets_are_pefts():
    peft = pytest.importorskip("peft.utils.constants")
    from pyqlora.inject import DEFAULT_TARGETS

    assert DEFAULT_TARGETS == peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def test_no_match_names_the_nearest():
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"Target modules \['downs'\] not found.*Nearest names: down; e.g. down"
    ):
        adapted(tiny.mlp(), target_modules=["downs"])
    with pytest.raises(ValueError, match="Nearest names: up"):
        adapted(tiny.mlp(), target_modules=r".*\.upp")
    with pytest.raises(ValueError, match="Nearest names: down, head, norm, up"):
        adapted(tiny.mlp(), target_modules=["zzzzz"])
    with pytest.raises(ValueError, match="'layers_to_transform': 9"):
        adapted(Blocks(), target_modules=["q_"], layers_to_transform=9)


def test_everything_excluded():
    with pytest.raises(ValueError, match="mismatched target modules and excluded modules"):
        adapted(tiny.mlp(), target_modules=["up"], exclude_modules=["up"])
    with pytest.raises(ValueError, match="All modules were excluded"):
        adapted(tiny.mlp(), target_modules=["up"], exclude_modules=".*")


def test_unused_exclusion_and_patterns_are_said():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapted(tiny.mlp(), target_modules=["up"], exclude_modules=["nothing"])
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match.*\['nothing'\]"):
        adapted(tiny.mlp(), target_modules=["up"], rank_pattern={"nothing": 3, "up": 3})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"target_modules": ["up", "dwn"]},
            "target_modules names dwn, but no module of the model is called so. Ne.*down",
        ),
        ({"target_modules": ["up"], "modules_to_save": ["haed"]}, "modules_to_save names haed, but .* Nearest.*head"),
    ],
)
def test_one_misspelt_name_among_others_is_said(settings, text):
    with pytest.warns(RuntimeWarning, match=text):
        get_peft_model(tiny.mlp(), LoraConfig(**settings))


@pytest.mark.filterwarnings("error")
def test_names_that_are_usual_need_not_all_be_there():
    model = tiny.mlp()
    model.config = {"model_type": "phi"}
    model.q_proj = nn.Linear(2, 2)
    get_peft_model(model, LoraConfig(modules_to_save=["classifier", "score", "ead"]))
    get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up", "down"], exclude_modules=["down"]))


def test_rank_and_alpha_patterns():
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["up", "down"], rank_pattern={"up": 5}, alpha_pattern={"d.*": 7}
    )
    model = get_peft_model(tiny.mlp(), config).get_base_model()
    assert (model.up.r["default"], model.down.r["default"]) == (5, 2)
    assert (model.up.scaling["default"], model.down.scaling["default"]) == (4 / 5, 7 / 2)
    assert pattern_value({"a.q": 1, "q": 2}, "x.a.q", 3) == 1


def test_match_tells_exclusion_apart():
    config = LoraConfig(target_modules=["q"], exclude_modules=["x.q"])
    assert match(config, "y.q") is True and match(config, "y.k") is False and match(config, "a.x.q") is EXCLUDED


def test_unsupported_module():
    with pytest.raises(ValueError, match=r"Target module LayerNorm.* is not supported.*torch.nn.Linear"):
        adapted(tiny.mlp(), target_modules=["norm"])


def test_unknown_kind_leaves_dtype_alone():
    model = get_peft_model(tiny.mlp(torch.bfloat16), LoraConfig(r=2, target_modules=["up"]))
    assert model.get_base_model().up.lora_A["default"].weight.dtype == torch.float32


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 3))
        self.q_proj = nn.Linear(3, 3)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*(q_proj|gate_proj)"])
def test_stacked_experts_that_target_modules_cannot_reach_are_said(targets):
    with pytest.warns(RuntimeWarning, match="get no adapter; target_parameters="):
        get_peft_model(nn.Sequential(Experts()), LoraConfig(target_modules=targets))
