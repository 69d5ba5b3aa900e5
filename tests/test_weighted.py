"""add_weighted_adapter against PEFT's results."""

from __future__ import annotations

import pytest
import tiny
import torch

from pyqlora import LoraConfig, get_peft_model
from pyqlora.weighted import elected, keep_largest, keep_random, tensor_merge

KINDS = ["svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_linear_svd", "magnitude_prune"]


def build(get, kind, ranks=(4, 4)):
    model = get(tiny.mlp(), kind(r=ranks[0], lora_alpha=6, target_modules=["up", "down"]))
    model.add_adapter("other", kind(r=ranks[1], lora_alpha=5, target_modules=["down", "head"], use_rslora=False))
    model.set_adapter("default")
    tiny.randomize(model)
    model.set_adapter("other")
    tiny.randomize(model, 5)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
def test_equals_peft(kind, weights):
    peft = pytest.importorskip("peft")
    x = torch.randn(3, 11)
    outputs = []
    for get, config in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        model = build(get, config)
        torch.manual_seed(3)
        model.add_weighted_adapter(["default", "other"], weights, "mix", kind, density=0.5)
        model.set_adapter("mix")
        assert model.peft_config["mix"].r == (8 if kind == "cat" else 4)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_cat_and_full_svd_are_exact():
    model = build(get_peft_model, LoraConfig, ranks=(4, 3))
    x = torch.randn(3, 11)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "cat", "cat")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "svd", "svd", svd_rank=7)
    outputs = []
    for name in ("cat", "svd"):
        model.set_adapter(name)
        outputs.append(model(x))
    base = model.get_base_model()
    deltas = [base.down.get_delta_weight(name) for name in ("default", "other")]
    torch.testing.assert_close(base.down.get_delta_weight("cat"), 0.5 * deltas[0] + 2 * deltas[1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_the_new_adapter_waits_frozen():
    model = build(get_peft_model, LoraConfig)
    model.add_weighted_adapter(["default"], [2.0], "twice", "svd")
    assert model.active_adapters == ["other"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "twice" in n)
    before = model.state_dict()
    model.add_weighted_adapter(["other"], [1.0], "twice")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((["default", "nobody"], [1, 1], "n", "svd"), "Adapter nobody does not exist"),
        ((["default", "other"], [1, 1], "n", "best"), "Invalid combination_type: best, expected one of svd, cat"),
        ((["default", "other"], [1, 1], "n", "best_svd"), "Invalid combination_type: best, .*, magnitude_prune_svd"),
        ((["default", "other"], [1, 1], "n", "linear"), "All adapters must have the same r"),
        ((["default", "other"], [1], "n", "svd"), "2 adapters but 1 weights"),
        ((["default", "other"], [1, 1], "n", "ties_svd"), "Density should be >= 0, got None"),
        (([], [], "n", "svd"), "Found no adapter"),
    ],
)
def test_errors(arguments, text):
    model = build(get_peft_model, LoraConfig, ranks=(4, 3))
    with pytest.raises(ValueError, match=text):
        model.add_weighted_adapter(*arguments)


def test_adapters_that_do_not_go_together():
    model = get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    model.add_adapter("regex", LoraConfig(target_modules="up"))
    model.add_adapter("saved", LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="should follow the same target modules type"):
        model.add_weighted_adapter(["default", "regex"], [1, 1], "n")
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        model.add_weighted_adapter(["default", "saved"], [1, 1], "n")


def test_pieces():
    x = torch.tensor([3.0, -1.0, 2.0, 0.5])
    assert keep_largest(x, 0.5).tolist() == [3, 0, 2, 0]
    assert set((keep_random(x, 0.5) / x).tolist()) <= {0.0, 2.0}
    stack = torch.tensor([[1.0, -3.0, 1.0], [2.0, 1.0, -1.0]])
    assert elected(stack, torch.ones(2, 1), "total").tolist() == [1.5, -3, 1]
    with pytest.raises(ValueError, match="'total' or 'frequency', got 'most'"):
        tensor_merge("ties", 0.5, "most")
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        tensor_merge("ties", 1.0, "total")
