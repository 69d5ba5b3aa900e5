"""Adapted layers while a model generates: what they compute is what they would compute without keeping anything."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import tiny
import torch
from torch import nn

import pyqlora
from pyqlora import _C, LoraConfig, get_peft_model, plans
from pyqlora.functional import set_activation_precision
from pyqlora.nn import Linear4bit, LinearNF4
from pyqlora.plans import keeping_plans


@pytest.fixture
def made(monkeypatch):
    """The layers whose calls were prepared, in their order."""
    made = []

    def prepared(self, *args, **kwargs):
        call = prepared.original(self, *args, **kwargs)
        made.append(self if call else None)
        return call

    prepared.original = Linear4bit.prepared_with_update
    monkeypatch.setattr(Linear4bit, "prepared_with_update", prepared)
    return made


def adapted(dtype=torch.float32, bias=False, **kwargs):
    """A LoRA layer over 64 → 32 with the adapters "default", in use, and "second"."""
    torch.manual_seed(0)
    layer = LinearNF4(64, 32, bias=bias, compute_dtype=dtype).to("cpu")
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **kwargs)
    model = get_peft_model(nn.Sequential(layer), config)
    model.add_adapter("second", LoraConfig(target_modules=["0"], init_lora_weights=False))
    return model.eval()


def run(model, x=None):
    return model(torch.linspace(-1, 1, 64)[None, None] if x is None else x)


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits(made, bias, dtype, rows):
    model, x = adapted(dtype, bias), torch.randn(1, rows, 64, dtype=dtype)
    want = run(model, x)
    with keeping_plans():
        assert all(torch.equal(run(model, y), want) for y in (x, x, x.transpose(0, 1).contiguous().transpose(0, 1)))
    assert len(made) == 1 and torch.equal(run(model, x), want) and len(made) == 1


def scaled(model):
    model.base_model.model[0].scale_layer(0.5)


def scaling_set(model):
    model.base_model.model[0].scaling["default"] = 3.0


def values_written(model):
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.mul_(2)
    layer.lora_B["default"].weight.data.add_(1)


CHANGES = [
    scaled,
    scaling_set,
    values_written,
    lambda model: model.set_adapter("second"),
    lambda model: model.base_model.set_adapter(["default", "second"]),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.merge_adapter(),
    lambda model: model.train(),
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_what_changes_meanwhile_counts(change):
    model = adapted(lora_dropout=0.5)
    before = run(model)
    with keeping_plans():
        assert torch.equal(run(model), before)
        change(model)
        torch.manual_seed(1)
        got = run(model)
    torch.manual_seed(1)
    want = run(model)
    assert torch.equal(got, want) and not torch.equal(want, before)


@torch.no_grad()
def test_a_disabled_adapter_comes_back():
    model = adapted()
    before = run(model)
    with keeping_plans():
        run(model)
        with model.disable_adapter():
            bare = run(model)
        assert torch.equal(run(model), before)
    assert torch.equal(bare, model.base_model.model[0].base_layer(torch.linspace(-1, 1, 64)[None, None]))


def test_gradients_dtypes_and_rows_of_a_call():
    model = adapted()
    with torch.no_grad(), keeping_plans():
        before = run(model)
        with torch.enable_grad():
            run(model).sum().backward()
        wide = run(model, torch.linspace(-1, 1, 64, dtype=torch.float64)[None])
        batch = run(model, torch.ones(2, 64))
        rows = model(torch.ones(2, 64), adapter_names=["second", "default"])
        assert torch.equal(run(model), before)
    assert model.base_model.model[0].lora_A["default"].weight.grad.any()
    with torch.no_grad():
        assert torch.equal(wide, run(model, torch.linspace(-1, 1, 64, dtype=torch.float64)[None]))
        assert wide.dtype == torch.float64 and torch.equal(batch, run(model, torch.ones(2, 64)))
        torch.testing.assert_close(rows[1], batch[1])
        assert (rows[0] - batch[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.skipif(_C.cpu.isa() == "scalar", reason="needs AVX2")
def test_activations_in_int16():
    model = adapted()
    with keeping_plans():
        before = run(model)
        held = set_activation_precision("int16")
        rounded = run(model)
        set_activation_precision(held)
        assert torch.equal(run(model), before)
    assert 0 < (rounded - before).abs().max() < 1e-2 * before.abs().max()


@torch.no_grad()
def test_replaced_parameters_count_from_the_next_time_on():
    model = adapted()
    factor = model.base_model.model[0].lora_B["default"]
    with keeping_plans():
        before = run(model)
        factor.weight.data = torch.zeros_like(factor.weight)
        other = torch.full_like(factor.weight, torch.nan)  # not in the memory that was the parameter's
        assert torch.equal(run(model), before)
    del other
    with keeping_plans():
        assert not torch.equal(run(model), before)


@torch.no_grad()
def test_computed_factors_are_not_kept(made):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = adapted()
    factor = model.base_model.model[0].lora_A["default"]
    nn.utils.parametrize.register_parametrization(factor, "weight", Doubled())
    with keeping_plans():
        before = run(model)
        factor.parametrizations.weight.original.mul_(2)
        assert not torch.equal(run(model), before)
    assert made == [None, None]


@torch.no_grad()
def test_is_of_one_thread_and_forgotten():
    model, seen = adapted(), []
    with pytest.raises(KeyError), keeping_plans():
        run(model)
        (plan,) = plans.plans().values()
        factor = weakref.ref(plan.call)
        thread = threading.Thread(target=lambda: seen.append(plans.plans()))
        thread.start()
        thread.join()
        with keeping_plans():
            assert plans.plans() == {}
        assert plans.plans()
        del plan
        raise KeyError
    gc.collect()
    assert plans.plans() is None and seen == [None] and factor() is None
    copy.deepcopy(model)


@torch.no_grad()
def test_compiled_models_trace_the_layer(made):
    model = adapted()
    want = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with keeping_plans():
        torch.testing.assert_close(run(compiled), want)
    assert made == []


def test_generate_prepares_each_layer_once(made):
    pytest.importorskip("transformers")
    model = tiny.llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = LinearNF4(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            layer.load_state_dict({"weight": module.weight})
            model.set_submodule(name, layer.to("cpu"))
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = pyqlora.get_peft_model(model, config).eval()
    ids = torch.arange(1, 9)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    want = model.base_model.model.generate(ids, **options)
    assert made == []
    got = model.generate(input_ids=ids, **options)
    assert torch.equal(got, want) and len(made) == 14 == len(set(made)) and plans.plans() is None
    named = model.generate(input_ids=ids, adapter_names=["default"], **options)
    assert torch.equal(named, want) and len(made) == 14
