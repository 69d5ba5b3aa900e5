"""LoraLayer as the base of a program's own layers, written as PEFT's guide says and registered with the config."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyqlora
from pyqlora import LoraConfig, PeftModel, get_layer_status, get_peft_model, hotswap
from pyqlora.layers import Linear
from pyqlora.lora_layer import LoraLayer

GATES = "base_model.model.lstm.lora_gate.default"


def lora_lstm(mixin):
    """A layer for nn.LSTM: what LoRA adds to the output is gated by one more parameter of the adapter."""

    class LoraLSTM(nn.Module, mixin):
        def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
            super().__init__()
            mixin.__init__(self, base_layer, **kwargs)
            self.lora_gate = nn.ParameterDict()
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
            base = self.get_base_layer()
            self.r[adapter_name], self.scaling[adapter_name] = r, lora_alpha / r
            self.lora_A[adapter_name] = nn.Linear(base.input_size, r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, base.hidden_size, bias=False)
            self.lora_gate[adapter_name] = nn.Parameter(torch.ones(base.hidden_size))
            self.set_adapter(self.active_adapters)

        def forward(self, x, *args, **kwargs):
            output, state = self.base_layer(x, *args, **kwargs)
            for name in [] if self.disable_adapters else self.active_adapters:
                if name in self.lora_A:
                    update = self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
                    output = output + self.lora_gate[name] * update
            return output, state

    return LoraLSTM


LoraLSTM = lora_lstm(LoraLayer)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Doubled(nn.Module, LoraLayer):
    """A layer for nn.Linear that takes its factors from LoraLayer and counts the update twice."""

    def __init__(self, base_layer, adapter_name, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.update_layer(adapter_name, **kwargs)

    def forward(self, x):
        result = self.base_layer(x)
        for name in self.updating():
            result = result + 2 * self.scaling[name] * self.lora_B[name](self.lora_dropout[name](self.lora_A[name](x)))
        return result


def config(kind=LoraConfig, layers=None, **changes):
    settings = kind(**{"r": 2, "lora_alpha": 6, "target_modules": ["lstm"], **changes})
    settings._register_custom_module({nn.LSTM: LoraLSTM} if layers is None else layers)
    return settings


def adapted(**changes):
    torch.manual_seed(1)
    return get_peft_model(Tagger(), config(**changes))


def doubled(**changes):
    torch.manual_seed(1)
    return get_peft_model(Tagger(), config(layers={nn.Linear: Doubled}, target_modules=["head"], **changes))


def x():
    return torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(3))


def train(model):
    """Losses of a few steps on all that is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(x()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("writer", ["peft", "pyqlora"])
def test_an_own_layer_trains_and_moves_as_in_peft(tmp_path, writer):
    """Same losses from the same seed, and a file that the other package reads, with the layer's own parameters."""
    peft = pytest.importorskip("peft")
    kinds = {"peft": lora_lstm(peft.tuners.lora.LoraLayer), "pyqlora": LoraLSTM}
    libraries = {"peft": peft, "pyqlora": pyqlora}
    losses = {}
    models = {}
    for name, library in libraries.items():
        torch.manual_seed(1)
        models[name] = library.get_peft_model(Tagger(), config(library.LoraConfig, {nn.LSTM: kinds[name]}))
        losses[name] = train(models[name])
    assert losses["peft"] == losses["pyqlora"]
    assert losses["pyqlora"][-1] < losses["pyqlora"][0]
    models[writer].save_pretrained(tmp_path)
    assert set(pyqlora.load_peft_weights(tmp_path)) == {
        f"base_model.model.lstm.{name}" for name in ("lora_A.weight", "lora_B.weight", "lora_gate")
    }
    (reader,) = {"peft", "pyqlora"} - {writer}
    read = libraries[reader].LoraConfig.from_pretrained(tmp_path)
    read._register_custom_module({nn.LSTM: kinds[reader]})
    loaded = libraries[reader].PeftModel.from_pretrained(Tagger(), tmp_path, config=read)
    assert torch.equal(loaded(x()), models[writer](x()))
    assert not torch.equal(loaded(x()), Tagger()(x()))


def test_an_unknown_kind_of_layer_is_warned_about():
    with pytest.warns(UserWarning, match="Unsupported layer type '<class 'torch.nn.modules.rnn.LSTM'>' encountered"):
        model = adapted()
    assert isinstance(model.base_model.model.lstm, LoraLSTM)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_of_an_own_layer_are_switched_frozen_and_deleted():
    """The parameters that only this layer has too."""
    model = adapted()
    layer = model.base_model.model.lstm
    model.add_adapter("other", config())
    nn.init.constant_(layer.lora_gate["other"], 3.0)
    first = model(x())
    model.set_adapter("other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"base_model.model.lstm.{name}" for name in ("lora_A.other.weight", "lora_B.other.weight", "lora_gate.other")
    }
    assert not torch.equal(model(x()), first)
    with model.disable_adapter():
        assert torch.equal(model(x()), Tagger()(x()))
    (status,) = get_layer_status(model)
    assert (status.available_adapters, status.requires_grad) == (
        ["default", "other"],
        {"default": False, "other": True},
    )
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert layer.adapters() == set(layer.lora_gate) == {"default"}
    assert torch.equal(model(x()), first)
    assert torch.equal(model.unload()(x()), Tagger()(x()))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_own_layers_parameters_are_hot_swapped(tmp_path):
    model = adapted()
    layer = model.base_model.model.lstm
    gate = layer.lora_gate["default"]
    model.save_pretrained(tmp_path)
    before = model(x())
    train(model)
    assert not torch.equal(model(x()), before)
    hotswap.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(x()), before)
    assert layer.lora_gate["default"] is gate


def test_the_factors_are_those_of_a_linear_layer_unless_it_makes_its_own():
    model = doubled(lora_dropout=0.5, init_lora_weights="gaussian")
    torch.manual_seed(1)
    plain = get_peft_model(
        Tagger(), LoraConfig(r=2, lora_alpha=6, target_modules=["head"], init_lora_weights="gaussian")
    )
    own, known = model.base_model.model.head, plain.base_model.model.head
    assert isinstance(known, Linear)
    assert torch.equal(own.lora_A["default"].weight, known.lora_A["default"].weight)
    for layer in (own, known):
        nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(5))
    model.eval()
    base = Tagger()(x())
    assert torch.allclose(model(x()) - base, 2 * (plain(x()) - base), atol=1e-6)
    assert not model.base_model.model.head.lora_dropout["default"].training


def test_a_subclass_of_a_known_layer_merges_as_that():
    class Half(Linear):
        def scaled_update(self, name):
            return super().scaled_update(name) / 2

        def update(self, name, x, result):
            return (super().update(name, x, result.clone()) + result) / 2

    torch.manual_seed(1)
    model = get_peft_model(Tagger(), config(layers={nn.Linear: Half}, target_modules=["head"], init_lora_weights=False))
    expected = model(x())
    assert not torch.allclose(expected, Tagger()(x()))
    assert torch.allclose(model.merge_and_unload()(x()), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_what_an_own_layer_lacks_is_named():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="LoraLSTM cannot be merged: it has no merge of its own"):
            call()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(NotImplementedError, match="LoraLSTM cannot be unmerged"):
        model.base_model.model.lstm.unmerge()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` to a model with custom layers: LoraLSTM"):
        model.eval()(x(), adapter_names=["default"] * 5)
    model = doubled()
    with pytest.raises(NotImplementedError, match="Doubled has no `delta_matrix`, its update as one matrix"):
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum", combination_type="svd")
    with pytest.raises(ValueError, match="Doubled does not support DoRA, please set use_dora to False"):
        doubled(use_dora=True)
    with pytest.raises(TypeError, match="PiSSA initialisation takes a part out of the base weight: Doubled cannot"):
        doubled(init_lora_weights="pissa")


def test_a_layer_whose_sizes_are_unknown_needs_its_own_factors():
    with (
        pytest.warns(UserWarning, match="Unsupported layer type"),
        pytest.raises(NotImplementedError, match="Doubled needs a make_factors of its own: LSTM, which it adapts"),
    ):
        get_peft_model(Tagger(), config(layers={nn.LSTM: Doubled}))


def test_factors_kept_elsewhere_need_a_method_that_gives_them():
    class Elsewhere(Doubled):
        def make_factors(self, name, r, config):
            self.lora_embedding_A[name] = nn.Parameter(torch.zeros(r, self.in_features))

    with pytest.raises(
        NotImplementedError, match="Elsewhere needs methods `factors` and `initialise` of its own: it d"
    ):
        get_peft_model(Tagger(), config(layers={nn.Linear: Elsewhere}, target_modules=["head"]))


def test_an_own_layer_is_a_module_and_a_lora_layer():
    for kind in (type("Bare", (LoraLayer,), {}), nn.Identity):
        with pytest.raises(TypeError, match=f"{kind.__name__}, named for Linear, must inherit from nn.Module and from"):
            get_peft_model(Tagger(), config(layers={nn.Linear: kind}, target_modules=["head"]))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_without_its_registration_a_saved_own_layer_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Target module LSTM"):
        PeftModel.from_pretrained(Tagger(), tmp_path)
