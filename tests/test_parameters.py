"""LoRA on single parameters: stacks of experts, in PEFT's layout and numbers, merged, from threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pyqlora import LoraConfig, PeftModel, get_peft_model
from pyqlora.parameters import ParamWrapper


class Experts(nn.Module):
    """Three experts of 4 -> 6 -> 4 features, stored [experts, in, out] if transposed and [experts, out, in] if not."""

    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 4, 6) if is_transposed else torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 6, 4) if is_transposed else torch.randn(3, 4, 6))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.einsum("beo,eoi->bi", torch.einsum("bi,eio->beo", x, up).relu(), down)


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(self.linear(x))


TARGETS = ["experts.down", "experts.up", "linear.weight"]


def mixture(is_transposed=False):
    torch.manual_seed(0)
    return Mixture(is_transposed)


def config(library=None, **changes):
    kind = LoraConfig if library is None else library.LoraConfig
    return kind(**{"r": 2, "target_modules": [], "target_parameters": TARGETS, "init_lora_weights": False, **changes})


def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_values_outputs_gradients_and_files_are_pefts(tmp_path, is_transposed, init):
    peft = pytest.importorskip("peft")
    changes = {"init_lora_weights": init, "rank_pattern": {"experts.up": 3}, "alpha_pattern": {"down": 5}}
    models = []
    for library in (peft, __import__("pyqlora")):
        base = mixture(is_transposed)
        torch.manual_seed(5)
        models.append(library.get_peft_model(base, config(library, **changes)))
        models[-1](x()).square().sum().backward()
    theirs, ours = models
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = others[name]
        assert torch.equal(parameter, other), name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-4, msg=name)
    torch.testing.assert_close(ours(x()), theirs(x()), rtol=1e-6, atol=1e-5)
    for writer, reader in ((theirs, PeftModel), (ours, peft.PeftModel)):
        writer.save_pretrained(tmp_path / "a")
        loaded = reader.from_pretrained(mixture(is_transposed), tmp_path / "a")
        torch.testing.assert_close(loaded(x()), ours(x()), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_merge_and_its_undoing(is_transposed):
    base = mixture(is_transposed)
    plain, model = base(x()), get_peft_model(base, config())
    adapted = model(x())
    assert not torch.allclose(adapted, plain)
    with model.disable_adapter():
        assert torch.equal(model(x()), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x()), adapted, rtol=1e-5, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x()), adapted, rtol=1e-5, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert type(merged.experts) is Experts and type(merged.linear) is nn.Linear
    torch.testing.assert_close(merged(x()), adapted, rtol=1e-5, atol=1e-4)
    assert type(model.unload().experts) is Experts


def test_wrappers_of_one_layer_are_nested_and_shared_by_adapters():
    model = get_peft_model(mixture(), config())
    model.add_adapter("other", config(r=4))
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert [wrapper.parameter_name for wrapper in wrappers] == ["weight", "down", "up"]
    assert all(wrapper.adapters() == {"default", "other"} for wrapper in wrappers)
    assert model.base_model.targeted_parameter_names == ["linear.weight", "experts.up", "experts.down"]
    assert "parameter_name='down'" in repr(model)


def test_two_active_adapters_add_up():
    model = get_peft_model(mixture(), config())
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    wrapper = model.base_model.model.experts
    both = wrapper.scaled_update("default") + wrapper.scaled_update("other")
    torch.testing.assert_close(wrapper.weight_with_updates(), wrapper.adapted_weight() + both)


def test_threads_see_their_own_values():
    """The base layer is never changed, not even for the time of a call."""
    one, two = get_peft_model(mixture(), config()), get_peft_model(mixture(), config(r=3))
    two.base_model.model.experts.base_layer.base_layer = one.base_model.model.experts.base_layer.base_layer
    wanted = {id(model): model(x()) for model in (one, two)}
    assert not torch.equal(wanted[id(one)], wanted[id(two)])
    with ThreadPoolExecutor(4) as pool:
        models = [one, two] * 100
        for model, result in zip(models, pool.map(lambda model: model(x()), models), strict=True):
            assert torch.equal(result, wanted[id(model)])


def test_replaced_forward_sees_the_adapter():
    """accelerate puts a partial, others a bound method in place of a module's forward."""
    from functools import partial

    model = get_peft_model(mixture(), config())
    adapted = model(x())
    experts = model.base_model.model.experts.get_base_layer()
    experts.forward = experts.forward
    assert torch.equal(model(x()), adapted)
    experts.forward = partial(Experts.forward, experts)
    assert torch.equal(model(x()), adapted)


def test_parametrized_parameter():
    base = mixture()
    nn.utils.parametrize.register_parametrization(base.linear, "weight", nn.Softplus())
    plain, model = base(x()), get_peft_model(base, config(target_parameters=["linear.weight"]))
    delta = model.base_model.model.linear.scaled_update("default")
    want = base.experts(nn.functional.linear(x(), base.linear.weight + delta, base.linear.bias))
    torch.testing.assert_close(model(x()), want)
    with pytest.raises(ValueError, match="computes this parameter from others"):
        model.merge_adapter()
    assert torch.equal(model.unload()(x()), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = get_peft_model(mixture().to(dtype), config())
    assert model(x().to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x().to(dtype)).isfinite().all()
    model(x().to(dtype)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"lora_dropout": 0.1}, "does not work with lora_dropout=0.1"),
        ({"use_dora": True}, "does not work with use_dora=True"),
        ({"lora_bias": True, "init_lora_weights": True}, "does not work with lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' for a parameter"),
        ({"target_parameters": ["own"]}, "on the top-level module is not supported"),
        ({"target_parameters": ["bias"]}, "1 dimensional Parameter, but only 2d and 3d"),
        ({"target_modules": ["linear"]}, "not also targeted with `target_modules`"),
        ({"target_parameters": ["nothing"]}, "but also no `target_parameters` found"),
    ],
)
def test_errors(changes, text):
    base = mixture()
    base.own = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=text):
        get_peft_model(base, config(**changes))


def test_other_errors():
    model = get_peft_model(mixture(), config())
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("other", config(target_parameters=["experts.up"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model.eval()(x(), adapter_names=["default"] * 5)
    experts = model.base_model.model.experts.get_base_layer()
    experts.down = nn.Parameter(experts.down.to("meta"))
    with pytest.raises(RuntimeError, match="is offloaded"):
        model(x())
    with pytest.raises(ValueError, match="without the state_dict"):
        from pyqlora import inject_adapter_in_model

        inject_adapter_in_model(config(), mixture(), state_dict={})


def test_unused_settings_are_said():
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        get_peft_model(mixture(), config(target_modules=["linear"], target_parameters=["nothing"]))
    with pytest.warns(RuntimeWarning, match="no module was matched"):
        get_peft_model(mixture(), config(target_modules=["nothing"], target_parameters=["experts.up"]))
