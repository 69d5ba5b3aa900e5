"""LoRA layers: initial values, forward against the merged weight, dtypes, merging, rows of different adapters."""

from __future__ import annotations

import itertools
import warnings

import pytest
import tiny
import torch
from torch import nn

from pyqlora import LoraConfig, dense, get_peft_model
from pyqlora.kinds import make_layer
from pyqlora.layers import Conv2d, Embedding, Linear
from pyqlora.nn import Linear4bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
]


class Kinds(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(13, 12, padding_idx=0)
        self.conv1 = nn.Conv1d(6, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2))
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.linear = nn.Linear(14, 3)

    def forward(self, tokens):
        x = self.conv1(self.table(tokens))  # [B, 6, 12] -> [B, 10, 6]
        x = self.conv2(x[:, None])  # [B, 4, 8, 5]
        x = self.conv3(x[:, None])  # [B, 2, 3, 7, 4]
        return self.linear(x.flatten(3).flatten(1, 2)[..., :14])


ALL = ["table", "conv1", "conv2", "conv3", "linear"]


def kinds(**kwargs):
    torch.manual_seed(0)
    model = Kinds()
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=ALL, **kwargs))


def tokens():
    return torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dora", [False, True])
def test_initial_values_and_outputs_are_pefts(init, dora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Kinds()
    torch.manual_seed(7)
    theirs = peft.get_peft_model(
        Kinds(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL, init_lora_weights=init, use_dora=dora)
    )
    torch.manual_seed(7)
    ours = get_peft_model(
        Kinds(), LoraConfig(r=4, lora_alpha=6, target_modules=ALL, init_lora_weights=init, use_dora=dora)
    )
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-6, atol=1e-7 if "magnitude" in key else 0, msg=key)
    assert ours.forward(tokens()).shape[0] == 2
    tiny.randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-5, atol=1e-5)
    assert model is not None


@pytest.mark.parametrize("kwargs", CONFIGS)
def test_merge_equals_forward_and_unmerge_restores(kwargs):
    if "lora_bias" in kwargs or kwargs.get("init_lora_weights") == "orthogonal":
        torch.manual_seed(0)
        model = get_peft_model(tiny.mlp(), LoraConfig(r=4, target_modules=["up", "down"], **kwargs))
        x = torch.randn(3, 11)
    else:
        model, x = kinds(**kwargs), tokens()
    tiny.randomize(model)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(model.get_base_model()(x), 0 * before)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-5, msg=key)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_into_4_bit(dtype, requantize):
    model = get_peft_model(tiny.mlp_4bit(dtype), LoraConfig(r=4, target_modules=["up", "down"]))
    tiny.randomize(model)
    base = model.get_base_model()
    packed = base.up.base_layer.weight.data.clone()
    exact = dense.read(base.up.base_layer) + base.up.get_delta_weight("default")
    x = torch.randn(3, 11).to(dtype)
    before = model(x)
    model.merge_adapter(requantize=requantize)
    assert isinstance(base.up.base_layer, Linear4bit) is requantize
    if requantize:
        assert base.up.base_layer.weight.quant_state.dtype == dtype
        want = tiny.mlp_4bit(dtype).up
        want = dense.read(dense.requantized(want, exact))
        assert torch.equal(dense.read(base.up.base_layer), want)
    else:
        assert base.up.base_layer.weight.dtype == dtype
        assert torch.equal(base.up.base_layer.weight, exact.to(dtype))
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02 if dtype != torch.float32 else 1e-4)
    model.unmerge_adapter()
    assert torch.equal(base.up.base_layer.weight.data, packed)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("base, adapter, given", itertools.product(DTYPES, DTYPES, DTYPES))
def test_dtypes(base, adapter, given, quantized):
    """The adapter's forward casts its input and returns what the base layer returns, under autocast or not."""
    bare = tiny.mlp_4bit(base).up if quantized else tiny.mlp(base).up
    if not quantized and given != base:
        pytest.skip("nn.Linear refuses such an input by itself")
    layer = make_layer(bare, "default", LoraConfig(r=4, lora_dropout=0.1), 4, 8)
    for parameter in layer.adapter_parameters():
        parameter.data = torch.randn_like(parameter.data).to(adapter)
    for training, autocast in itertools.product((True, False), (True, False)):
        layer.train(training)
        x = torch.randn(5, 11).to(given).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
            assert y.dtype == bare(x).dtype
        y.float().sum().backward()
        assert x.grad.dtype == given
        for parameter in layer.adapter_parameters():
            assert parameter.grad.dtype == adapter and parameter.grad.abs().sum() > 0
            parameter.grad = None


def test_a_hook_on_the_base_layer_keeps_what_it_saw():
    layer = make_layer(nn.Linear(4, 3), "default", LoraConfig(init_lora_weights=False), 2, 2)
    seen = []
    layer.base_layer.register_forward_hook(lambda _, __, output: seen.append(output))
    x = torch.randn(2, 4)
    y = layer(x)
    assert torch.equal(seen[0], nn.functional.linear(x, layer.weight, layer.bias)) and not torch.equal(y, seen[0])


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_splitting_initialisers_keep_the_function(init):
    x = torch.randn(3, 11)
    want = tiny.mlp()(x)
    model = get_peft_model(tiny.mlp(), LoraConfig(r=4, lora_alpha=3, target_modules=["up"], init_lora_weights=init))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.get_base_model().up.weight, tiny.mlp().up.weight)
    peft = pytest.importorskip("peft")
    if "niter" not in init:  # the randomized one draws random numbers
        theirs = peft.get_peft_model(
            tiny.mlp(), peft.LoraConfig(r=4, lora_alpha=3, target_modules=["up"], init_lora_weights=init)
        )
        for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_pissa_on_4_bit_requantizes_the_rest():
    model = get_peft_model(tiny.mlp_4bit(), LoraConfig(r=8, target_modules=["up"], init_lora_weights="pissa"))
    layer = model.get_base_model().up
    whole = dense.read(layer.base_layer) + layer.get_delta_weight("default")
    plain = dense.read(tiny.mlp_4bit().up)
    assert isinstance(layer.base_layer, Linear4bit)
    assert (whole - plain).norm() < 0.1 * plain.norm()


def test_loftq_lowers_the_quantization_error():
    weight = tiny.mlp().up.weight
    plain = dense.read(tiny.mlp_4bit().up)
    config = LoraConfig(
        r=4, target_modules=["up"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 3}
    )
    layer = get_peft_model(tiny.mlp(), config).get_base_model().up
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    assert (whole - weight).norm() < 0.8 * (plain - weight).norm()


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "rank to be even, got 3"),
        ({"init_lora_weights": "best"}, "Unknown initialization init_lora_weights='best'"),
        ({"init_lora_weights": "pissa_iter_3"}, "Unknown initialization"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 1}}, "quantizes to 4 bits"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 0}}, "must be positive"),
    ],
)
def test_initialiser_errors(kwargs, text):
    with pytest.raises(ValueError, match=text):
        get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"], **kwargs))


def test_broken_adapter_is_not_merged():
    model = get_peft_model(tiny.mlp(), LoraConfig(target_modules=["up"]))
    model.get_base_model().up.lora_B["default"].weight.data.fill_(float("nan"))
    before = model.get_base_model().up.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.get_base_model().up.weight, before)


def test_lora_bias_needs_a_bias_to_merge():
    with pytest.warns(UserWarning, match="has no bias"):
        model = get_peft_model(tiny.mlp(bias=False), LoraConfig(target_modules=["up"], lora_bias=True))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_adapter()


def test_embedding_has_no_lora_bias():
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        make_layer(nn.Embedding(3, 4), "default", LoraConfig(lora_bias=True), 2, 2)


def test_grouped_convolution():
    base = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="groups=2 and rank 3"):
        make_layer(base, "default", LoraConfig(), 3, 2)
    with pytest.warns(UserWarning, match="Merging is not supported"):
        layer = make_layer(base, "default", LoraConfig(init_lora_weights=False), 2, 2)
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        layer.merge()


def test_grouped_convolution_with_dora_is_pefts():
    peft = pytest.importorskip("peft")
    outputs = []
    for library in (peft, __import__("pyqlora")):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
        config = library.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
        with pytest.warns(UserWarning, match="groups > 1"):
            model = library.get_peft_model(base, config)
        outputs.append(model(torch.randn(1, 4, 5, 5)))
    torch.testing.assert_close(*outputs)


def test_scaling():
    layer = make_layer(nn.Linear(4, 3), "default", LoraConfig(), 2, 6)
    layer.scale_layer(2)
    assert layer.scaling["default"] == 6
    layer.unscale_layer(3)
    assert layer.scaling["default"] == 2
    layer.unscale_layer()
    assert layer.scaling["default"] == 3
    layer.set_scale("default", 10)
    layer.set_scale("other", 10)
    assert layer.scaling == {"default": 30}


def test_kinds_and_fan_in_fan_out():
    model = kinds().get_base_model()
    assert (type(model.linear), type(model.table), type(model.conv2)) == (Linear, Embedding, Conv2d)
    with pytest.warns(UserWarning, match=r"fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        make_layer(nn.Linear(4, 3), "default", LoraConfig(fan_in_fan_out=True), 2, 6)


def test_conv1d_of_transformers():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.randn(3, 5)
    for kwargs in ({}, {"use_dora": True}, {"init_lora_weights": "olora"}):
        base = conv(7, 5)
        want = base(x)
        with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
            layer = make_layer(base, "default", LoraConfig(**kwargs), 2, 6)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        tiny.randomize(layer)
        before = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_repr_and_properties():
    layer = make_layer(nn.Linear(4, 3), "default", LoraConfig(), 2, 6)
    assert repr(layer).startswith("lora.Linear(")
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.merge(adapter_names=["unknown"])
    with pytest.raises(TypeError, match="should be a list of strings"):
        layer.merge(adapter_names="default")


@pytest.mark.parametrize("how", ["forward", "forward_pre", "full_backward", "full_backward_pre", "replaced"])
def test_what_watches_a_4_bit_base_layer_sees_its_call(how):
    """The fused path may not pass by hooks, nor by a forward that was put over the layer's own."""
    model = nn.Sequential(Linear4bit(64, 64, bias=False).to("cpu"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer, seen = model.base_model.model[0], []
    x = torch.randn(3, 64, requires_grad=True)
    alone, base, own = layer(x), layer.base_layer, layer.base_layer.forward
    if how == "replaced":
        base.forward = lambda x: seen.append(how) or own(x)
    else:
        getattr(base, f"register_{how}_hook")(lambda *_: seen.append(how))
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, alone)
    assert seen == [how]
