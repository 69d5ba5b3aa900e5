from __future__ import annotations

import copy

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap


class Mixed(nn.Module):
    """An embedding, a grouped convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 12)
        self.conv = nn.Conv1d(12, 12, 1, groups=2)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.conv(self.table(x).mT).mT)


class Stacked(nn.Module):
    """Attention, whose output projection has a LoRA layer of its own, and a stack of two experts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(self.attention(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 3, 8))

    def forward(self, x):
        return torch.einsum("si,eji->sej", x, self.down)


MODELS = {
    "mlp": (tiny.mlp, ["up", "down"], torch.linspace(-1, 1, 33).view(3, 11)),
    "4-bit": (tiny.mlp_4bit, ["up", "down"], torch.linspace(-1, 1, 33).view(3, 11)),
    "mixed": (Mixed, ["table", "conv", "out"], torch.tensor([[1, 2, 6], [0, 5, 3]])),
    "stacked": (Stacked, ["attention"], torch.linspace(-1, 1, 32).view(4, 8)),
}
RANKED = ("mlp", "4-bit", "mixed")  # all of whose layers take any rank


def build(kind):
    torch.manual_seed(0)
    return MODELS[kind][0]()


def save(path, kind="mlp", seed=0, **config):
    """A random adapter in a directory."""
    model = build(kind)
    torch.manual_seed(seed)
    config = {"target_modules": MODELS[kind][1], "init_lora_weights": False, **config}
    get_peft_model(model, LoraConfig(**config)).save_pretrained(path)
    return path


@torch.no_grad()
def output(model, kind="mlp"):
    return model.eval()(MODELS[kind][2])


def loaded(path, kind="mlp"):
    return PeftModel.from_pretrained(build(kind), path)


OTHERS = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 12},
    {"r": 2, "lora_alpha": 3},
    {"r": 8, "lora_alpha": 3},
    {"r": 6, "use_rslora": True},
]


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_swapping_there_and_back(tmp_path, kind, other, prepared):
    """The model computes as if the other adapter had been loaded; its parameters are the same objects."""
    first, second = save(tmp_path / "1", kind, r=4), save(tmp_path / "2", kind, seed=1, **other)
    model = loaded(first, kind)
    expected = output(model, kind)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        torch.testing.assert_close(output(model, kind), expected)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, second, "default")
    torch.testing.assert_close(output(model, kind), output(loaded(second, kind), kind))
    hotswap_adapter(model, first, "default")
    torch.testing.assert_close(output(model, kind), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_what_is_saved_after_a_swap_loads_as_it_ran(tmp_path, kind, other, prepared):
    model = loaded(save(tmp_path / "1", kind, r=4), kind)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, save(tmp_path / "2", kind, seed=1, **other), "default")
    model.save_pretrained(tmp_path / "3")
    torch.testing.assert_close(output(loaded(tmp_path / "3", kind), kind), output(model, kind))


def test_patterns(tmp_path):
    first = save(tmp_path / "1", r=4)
    second = save(tmp_path / "2", seed=1, r=3, lora_alpha=5, rank_pattern={"up": 7}, alpha_pattern={"down": 2})
    model = loaded(first)
    hotswap_adapter(model, second, "default")
    torch.testing.assert_close(output(model), output(loaded(second)))
    model.save_pretrained(tmp_path / "3")
    torch.testing.assert_close(output(loaded(tmp_path / "3")), output(loaded(second)))


STACKED = {"target_parameters": ["experts.down"], "rank_pattern": {"attention": 3}}


def test_attention_and_experts(tmp_path):
    """Also their ranks and scalings in the config that is saved after the swap."""
    first = save(tmp_path / "1", "stacked", r=2, lora_alpha=3, **STACKED)
    second = save(tmp_path / "2", "stacked", seed=1, r=2, lora_alpha=5, alpha_pattern={"experts.down": 7}, **STACKED)
    model = loaded(first, "stacked")
    hotswap_adapter(model, second, "default")
    expected = output(loaded(second, "stacked"), "stacked")
    torch.testing.assert_close(output(model, "stacked"), expected)
    assert (model.peft_config["default"].r, model.peft_config["default"].alpha_pattern) == (3, {"experts.down": 7})
    model.save_pretrained(tmp_path / "3")
    torch.testing.assert_close(output(loaded(tmp_path / "3", "stacked"), "stacked"), expected)


def test_preparing_attention_and_experts(tmp_path):
    first = save(tmp_path / "1", "stacked", **{**STACKED, "r": 2, "rank_pattern": {}})
    model = loaded(first, "stacked")
    expected = output(model, "stacked")
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    torch.testing.assert_close(output(model, "stacked"), expected)
    with pytest.raises(ValueError, match="pad a ParamWrapper LoRA adapter of rank 2 to target rank 4: only linear"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)


def test_prepared_model_saves_what_it_computes(tmp_path):
    model = loaded(save(tmp_path / "1", r=4, lora_alpha=6, rank_pattern={"up": 2}, alpha_pattern={"down": 3}))
    expected = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=5, config=model.peft_config)
    model.save_pretrained(tmp_path / "2")
    torch.testing.assert_close(output(loaded(tmp_path / "2")), expected)


def test_layers_that_the_new_adapter_leaves_out_get_zeros(tmp_path):
    model = loaded(save(tmp_path / "1"))
    second = save(tmp_path / "2", seed=1, target_modules=["up"])
    hotswap_adapter(model, second, "default")
    torch.testing.assert_close(output(model), output(loaded(second)))


def test_compiled_model_is_not_compiled_again(tmp_path):
    first, second = save(tmp_path / "1", r=4), save(tmp_path / "2", seed=1, r=7, lora_alpha=3)
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.eval(), backend=count)
    output(compiled)
    before = len(graphs)
    hotswap_adapter(compiled, second, "default")
    torch.testing.assert_close(output(compiled), output(loaded(second)))
    assert len(graphs) == before


def test_modules_trained_whole(tmp_path):
    first = save(tmp_path / "1", modules_to_save=["head"])
    second = save(tmp_path / "2", seed=1, modules_to_save=["head"])
    weights = load_file(second / "adapter_model.safetensors")
    weights["base_model.model.head.weight"] += 1
    save_file(weights, second / "adapter_model.safetensors")
    model = loaded(first)
    hotswap_adapter(model, second, "default")
    torch.testing.assert_close(output(model), output(loaded(second)))
    with pytest.raises(RuntimeError, match=r"it has no weights for .*head\.modules_to_save\.default\.bias, .*whole"):
        hotswap_adapter(model, save(tmp_path / "3"), "default")


def test_nothing_changes_when_the_adapter_does_not_fit(tmp_path):
    model = loaded(save(tmp_path / "1"))
    before = copy.deepcopy(model.state_dict())
    second = save(tmp_path / "2", seed=1, target_modules=["up", "down", "head"])
    with pytest.raises(
        RuntimeError, match=r"unexpected keys found: base_model\.model\.head\.lora_A\.default\.weight, .*lora_B"
    ):
        hotswap_adapter(model, second, "default")
    weights = {
        "base_model.model.down.lora_B.default.weight": torch.ones(11, 2),
        "base_model.model.up.lora_A.default.weight": torch.ones(2, 10),
    }
    with pytest.raises(ValueError, match=r"has shape \[2, 10\], expected \[8, 11\] with any rank"):
        hotswap_adapter_from_state_dict(model, weights, "default", LoraConfig(r=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_adapter(tmp_path):
    path = save(tmp_path / "1")
    with pytest.raises(ValueError, match=r"no adapter 'other' in this model, it has \['default'\]"):
        hotswap_adapter(loaded(path), path, "other")
    with pytest.raises(ValueError, match="no layer of this model has an adapter 'default'"):
        hotswap_adapter_from_state_dict(tiny.mlp(), {}, "default", LoraConfig())


def test_configs_that_need_other_parameters(tmp_path):
    second = save(tmp_path / "2", use_dora=True)
    with pytest.raises(ValueError, match="Configs are incompatible: for use_dora, False != True; load it beside"):
        hotswap_adapter(loaded(save(tmp_path / "1")), second, "default")


def test_preparing_refuses():
    def model():
        return get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], r=4))

    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(tiny.mlp())
    with pytest.raises(ValueError, match=r"target rank 3, but the original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(model(), target_rank=3)
    compiled = torch.compile(model(), backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.raises(ValueError, match="one of 'error', 'warn', or 'ignore', got 'no'"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="no")
    with pytest.warns(UserWarning, match="a model that is already compiled: it will be compiled again"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")


def test_preparing_refuses_a_rank_that_groups_do_not_divide():
    config = LoraConfig(target_modules=["conv"], r=4)
    with pytest.warns(UserWarning, match="groups > 1"):
        model = get_peft_model(Mixed(), config)
    with pytest.raises(ValueError, match="groups=2 to target rank 5, but the target rank is not divisible by 2"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
