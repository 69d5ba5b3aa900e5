"""Experts of transformers 5: targets and adapters of transformers 4 brought to the stacked parameters."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

pytest.importorskip("transformers.conversion_mapping", reason="transformers 4 does not stack experts")

from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.experts import conversions, stack_factors, stacks
from pyqlora.hotswap import hotswap_adapter
from pyqlora.parameters import ParamWrapper

EXPERTS, WIDTH, INNER, R, ALPHA = 3, 8, 12, 2, 5
IDS = torch.arange(3, 19).view(1, -1)
KINDS = {
    "mixtral": (MixtralConfig, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3": (Qwen3MoeConfig, "mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen2": (Qwen2MoeConfig, "mlp", ("gate_proj", "up_proj", "down_proj")),
}


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = KINDS[kind][0](
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def old_adapter(kind: str, directory, targets=None, **changes) -> dict[str, torch.Tensor]:
    """An adapter as transformers 4 and PEFT would have saved it, with its router; returns its weights."""
    block, projections = KINDS[kind][1:]
    torch.manual_seed(1)
    weights = {}

    def add(path: str, inputs: int, outputs: int, r: int) -> None:
        weights[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, inputs)
        weights[f"base_model.model.{path}.lora_B.weight"] = torch.randn(outputs, r) * 0.3

    ranks = changes.get("rank_pattern", {})
    for layer in (f"model.layers.{i}" for i in range(2)):
        add(f"{layer}.self_attn.q_proj", WIDTH, WIDTH, R)
        add(f"{layer}.{block}.gate", WIDTH, EXPERTS, R)
        for path in (f"{layer}.{block}.experts.{i}" for i in range(EXPERTS)):
            for name in projections[:2]:
                add(f"{path}.{name}", WIDTH, INNER, ranks.get(name, R))
            add(f"{path}.{projections[2]}", INNER, WIDTH, ranks.get(projections[2], R))
        if kind == "qwen2":
            for name in projections:
                sizes = (INNER, WIDTH) if name == projections[2] else (WIDTH, INNER)
                add(f"{layer}.{block}.shared_expert.{name}", *sizes, ranks.get(name, R))
    config = LoraConfig(r=R, lora_alpha=ALPHA, inference_mode=True, **changes).to_dict()
    config["target_modules"] = targets or ["q_proj", "gate", *projections]
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, directory / "adapter_model.safetensors")
    return weights


def updated(kind: str, weights: dict[str, torch.Tensor], scaling: float = ALPHA / R) -> nn.Module:
    """The model with every update added to the weight that its expert has in the stack."""
    model, block, projections = base(kind), *KINDS[kind][1:]
    for layer, module in enumerate(model.model.layers):
        moe = getattr(module, "mlp", None)

        def update(path, layer=layer):
            a, b = (weights[f"base_model.model.model.layers.{layer}.{path}.lora_{kind}.weight"] for kind in "AB")
            return scaling * b @ a

        with torch.no_grad():
            module.self_attn.q_proj.weight += update("self_attn.q_proj")
            moe.gate.weight += update(f"{block}.gate")
            for i in range(EXPERTS):
                path = f"{block}.experts.{i}"
                moe.experts.gate_up_proj[i] += torch.cat([update(f"{path}.{name}") for name in projections[:2]])
                moe.experts.down_proj[i] += update(f"{path}.{projections[2]}")
            for name in projections if kind == "qwen2" else ():
                getattr(moe.shared_expert, name).weight += update(f"{block}.shared_expert.{name}")
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("left", [False, True])
def test_stack_factors_multiply_to_every_experts_update(left):
    parts = {"A": [[torch.randn(r, 5) for _ in range(3)] for r in (2, 4)]}
    parts["B"] = [[torch.randn(n, r) for _ in range(3)] for n, r in ((7, 2), (6, 4))]
    a, b = stack_factors(parts["A"], left=False), stack_factors(parts["B"], left=True)
    assert a.shape == (3 * 6, 5) and b.shape == (13, 6 * 3)
    for i in range(3):
        update = b.view(13, 6, 3)[..., i] @ a.view(3, 6, 5)[i]
        expected = torch.cat([parts["B"][p][i] @ parts["A"][p][i] for p in range(2)])
        torch.testing.assert_close(update, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_transformers_4_computes_what_it_did_there(tmp_path, kind, low_cpu_mem_usage):
    weights = old_adapter(kind, tmp_path / "old")
    expected = logits(updated(kind, weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(base(kind), tmp_path / "old", low_cpu_mem_usage=low_cpu_mem_usage)
    close(logits(model), expected)
    model.save_pretrained(tmp_path / "new")
    close(logits(PeftModel.from_pretrained(base(kind), tmp_path / "new")), expected)
    model.load_adapter(tmp_path / "old", "second")
    model.set_adapter("second")
    close(logits(model), expected)
    close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])  # PEFT leaves qwen2's shared expert without its part
def test_an_old_adapter_gives_pefts_logits(tmp_path, kind):
    peft = pytest.importorskip("peft")
    old_adapter(kind, tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    ours = PeftModel.from_pretrained(base(kind), tmp_path / "old")
    close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours")), logits(theirs))
    close(logits(PeftModel.from_pretrained(base(kind), tmp_path / "theirs")), logits(theirs))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"use_rslora": True}, ALPHA / R**0.5),
        ({"rank_pattern": {"w1": 4, "w3": 6}, "alpha_pattern": {"w1": 10, "w3": 15}}, ALPHA / R),
        ({"rank_pattern": {"w2": 4}, "alpha_pattern": {"w2": 10}}, ALPHA / R),
    ],
)
def test_ranks_and_scaling_of_an_old_adapter(tmp_path, changes, scaling):
    weights = old_adapter("mixtral", tmp_path / "old", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(base("mixtral"), tmp_path / "old")
    close(logits(model), logits(updated("mixtral", weights, scaling)))


@pytest.mark.parametrize(
    "targets",
    [
        r".*\.(q_proj|gate|gate_proj|up_proj|down_proj)",
        r"^(model(?=\.).*\.(q_proj|gate|gate_proj|up_proj|down_proj))$",
        r".*(q_proj|mlp\.gate|experts\.\d+\.\w+)",
    ],
)
def test_an_old_adapter_whose_targets_are_a_pattern(tmp_path, targets):
    weights = old_adapter("qwen3", tmp_path / "old", targets)
    model = PeftModel.from_pretrained(base("qwen3"), tmp_path / "old")
    close(logits(model), logits(updated("qwen3", weights)))
    assert model.peft_config["default"].target_modules == {"q_proj"}


def test_a_pattern_with_the_names_of_transformers_4(tmp_path):
    weights = old_adapter("mixtral", tmp_path / "old", r".*(q_proj|block_sparse_moe\.(gate|experts\.\d+\.w[123]))")
    model = PeftModel.from_pretrained(base("mixtral"), tmp_path / "old")
    close(logits(model), logits(updated("mixtral", weights)))


def targeted(kind: str, targets, **changes) -> tuple[LoraConfig, set[str]]:
    """The config after injection, and the layers with an adapter, named from the first decoder layer on."""
    model = get_peft_model(base(kind), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **changes))
    names = {name for name, _ in model.get_base_model().named_modules() if name.endswith(".lora_A.default")}
    return model.peft_config["default"], {name.removesuffix(".lora_A.default") for name in names}


def test_all_linear_names_experts_and_router_too():
    config, layers = targeted("qwen3", "all-linear")
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    moe = {"mlp.gate", "mlp.experts", "mlp.experts.base_layer"}
    assert layers == {f"model.layers.{i}.{name}" for i in range(2) for name in attention | moe}
    assert config.target_parameters == ["down_proj", "gate.weight", "gate_up_proj"]
    assert config.rank_pattern == {r".*\.gate_up_proj": 2 * R}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 2 * ALPHA}
    again = LoraConfig(**config.to_dict())
    get_peft_model(base("qwen3"), again)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("exclude", [["experts"], r".*experts\.\d+.*", ["down_proj", "gate_up_proj"]])
def test_excluded_experts(targets, exclude):
    _, layers = targeted("qwen3", targets, exclude_modules=exclude)
    assert "model.layers.0.self_attn.q_proj" in layers and not any("experts" in layer for layer in layers)


def test_layers_of_the_same_name_outside_of_the_experts_stay_targets():
    config, layers = targeted("qwen2", ["gate_proj", "up_proj", "down_proj"])
    assert {name for name in layers if "layers.0" in name} == {
        *(f"model.layers.0.mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        *("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.base_layer"),
    }
    assert config.target_modules == {"gate_proj", "up_proj", "down_proj"}


def test_some_layers_only():
    config, layers = targeted("mixtral", ["w2", "q_proj"], layers_to_transform=[1])
    assert layers == {"model.layers.1.mlp.experts", "model.layers.1.self_attn.q_proj"}
    assert config.target_modules == {"q_proj"} and config.target_parameters == ["model.layers.1.mlp.experts.down_proj"]
    config, layers = targeted("qwen3", r"model\.layers\.0\..*\.(q_proj|gate)")
    assert layers == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"}
    assert config.target_modules == {"0.self_attn.q_proj"}
    assert config.target_parameters == ["model.layers.0.mlp.gate.weight"]


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], r".*\.(up_proj|down_proj)"])
def test_half_of_a_stack_is_refused(targets):
    with pytest.raises(ValueError, match="up_proj without also targeting gate_proj because they are fused"):
        targeted("qwen3", targets)


def test_unlike_scaling_in_a_stack_is_refused():
    with pytest.raises(ValueError, match=r"gate_proj, up_proj are one parameter in this model, gate_up_proj, whose"):
        targeted("qwen3", ["gate_proj", "up_proj"], rank_pattern={"up_proj": 4})


def test_dropout_is_refused_for_training_and_left_out_without(tmp_path):
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1\. gate_up_proj is adapted.*with exclude_modules"):
        targeted("qwen3", ["gate_proj", "up_proj"], lora_dropout=0.1)
    weights = old_adapter("qwen3", tmp_path / "old", lora_dropout=0.1)
    model = PeftModel.from_pretrained(base("qwen3"), tmp_path / "old")
    close(logits(model), logits(updated("qwen3", weights)))
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        PeftModel.from_pretrained(base("qwen3"), tmp_path / "old", is_trainable=True)


def test_an_incomplete_set_of_experts_is_named(tmp_path):
    weights = old_adapter("qwen3", tmp_path / "old")
    gone = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    del weights[gone]
    safetensors.torch.save_file(weights, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys") as seen:
        PeftModel.from_pretrained(base("qwen3"), tmp_path / "old")
    text = " ".join(str(warning.message) for warning in seen)
    assert "layers.1.mlp.experts.base_layer.lora_B.default.weight" in text  # missing
    assert gone.replace("up_proj", "gate_proj") in text  # unexpected, by the file's name


def test_models_without_experts_are_left_alone():
    assert conversions(nn.Linear(2, 2)) == [] and stacks([]) == []
    config = LoraConfig(target_modules=r".*\.w2")
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    assert config.target_modules == r".*\.w2" and config.target_parameters is None


def test_parameter_wrappers_take_the_place_of_old_layers():
    model = get_peft_model(base("mixtral"), LoraConfig(target_modules=["w2"]))
    assert [type(layer) for layer in model.base_model.lora_layers()] == [ParamWrapper] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_hot_swapping_to_an_adapter_of_transformers_4(tmp_path, kind):
    """Its own ranks and alphas, by the names of the old layers, come along, also into what is saved."""
    patterns = {"alpha_pattern": dict.fromkeys(KINDS[kind][2], 4)}
    weights = old_adapter(kind, tmp_path / "old", **patterns)
    model = PeftModel.from_pretrained(base(kind), tmp_path / "old")
    before = logits(model)
    model.save_pretrained(tmp_path / "new")
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == R:
            nn.init.normal_(parameter)
    assert not torch.allclose(logits(model), before)
    hotswap_adapter(model, tmp_path / "old", "default")
    close(logits(model), before)
    model.save_pretrained(tmp_path / "swapped")
    close(logits(PeftModel.from_pretrained(base(kind), tmp_path / "swapped")), before)
    hotswap_adapter(model, tmp_path / "new", "default")
    close(logits(model), before)
    for key in [key for key in weights if ".experts.1." in key]:
        del weights[key]
    safetensors.torch.save_file(weights, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*experts\.0\.\w+\.lora_A\.default\.weight"):
        hotswap_adapter(model, tmp_path / "old", "default")
