import copy
import inspect
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyqlora import nn, quant
from pyqlora.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit, linear4bit


def layer(k=64, n=48, seed=0, **kwargs):
    """A quantized layer and the float layer it was made from."""
    torch.manual_seed(seed)
    dense = torch.nn.Linear(k, n)
    made = Linear4bit(k, n, quant_type="nf4", **kwargs)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu"), dense


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("name", [name for name in nn.__all__ if "4" in name])
def test_arguments_are_bitsandbytes(name):
    peer = pytest.importorskip("bitsandbytes.nn")
    method = "__new__" if name == "Params4bit" else "__init__"
    ours, theirs = (inspect.signature(getattr(getattr(module, name), method)) for module in (nn, peer))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("kind", [LinearNF4, LinearFP4])
def test_quantizes_on_the_way_to_a_device(kind):
    made = kind(64, 48)
    weight = made.weight.detach().clone()
    made.to("cpu")
    packed, state = quant.quantize_4bit(weight, 64, "nf4" if kind is LinearNF4 else "fp4", True)
    assert torch.equal(made.weight.detach(), packed) and made.weight.quant_state == state == made.quant_state
    made.to("cpu")
    assert torch.equal(made.weight.detach(), packed)


def test_forward_before_quantization():
    with pytest.raises(ValueError, match=r"Linear4bit is not quantized yet.*layer\.to\('cpu'\)"):
        Linear4bit(64, 48)(inputs(1, 64))


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward(dtype, compute_dtype):
    """Against the dequantized weight in float64; the result is in the input's dtype, computed in compute_dtype."""
    made, dense = layer(compute_dtype=compute_dtype)
    x = inputs(2, 3, 64, dtype=dtype)
    weight = quant.dequantize_4bit(made.weight.detach(), made.quant_state).double()
    exact = x.double() @ weight.t() + dense.bias.double()
    y = made(x)
    eps = max(torch.finfo(dtype).eps, torch.finfo(compute_dtype or dtype).eps)
    assert y.dtype == dtype and y.shape == (2, 3, 48)
    assert ((y - exact).abs() <= 2 * eps * (x.double().abs() @ weight.abs().t() + dense.bias.abs() + 1)).all()


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16], ids=str)
def test_bfloat16_is_computed_in_bfloat16(compute_dtype, monkeypatch):
    """With transformers' default of float32 too: by the kernels for bfloat16, and in one function with an update."""
    seen = []
    product = linear4bit.linear_4bit
    monkeypatch.setattr(linear4bit, "linear_4bit", lambda x, *rest: seen.append(x.dtype) or product(x, *rest))
    made, _ = layer(compute_dtype=compute_dtype)
    for dtype, computed in ((torch.bfloat16, torch.bfloat16), (torch.float32, compute_dtype)):
        x, a, b = inputs(5, 64, dtype=dtype), inputs(4, 64), inputs(48, 4)
        assert made(x).dtype == dtype and seen.pop() == computed
        assert (made.forward_with_update(x, a, b, 1.0, 0.0) is None) == (dtype != computed)


def test_bias_keeps_its_dtype():
    made, _ = layer(compute_dtype=torch.bfloat16)
    made(inputs(1, 64, dtype=torch.bfloat16))
    assert made.bias.dtype == torch.float32


def test_gradients_reach_input_and_bias():
    made, dense = layer()
    x, y = inputs(5, 64).requires_grad_(), inputs(5, 64).requires_grad_()
    dense.weight.data = quant.dequantize_4bit(made.weight.detach(), made.quant_state)
    made(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-5) and torch.allclose(made.bias.grad, dense.bias.grad, atol=1e-5)
    assert made.weight.grad is None


def test_state_dict_equals_bitsandbytes():
    peer = pytest.importorskip("bitsandbytes")
    made, dense = layer()
    other = peer.nn.Linear4bit(64, 48, quant_type="nf4")
    other.load_state_dict(dense.state_dict())
    ours, theirs = made.state_dict(), other.to("cpu").state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kwargs", [{}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}], ids=str)
def test_quantized_state_dict_loads_strictly(kwargs, device, assign, tmp_path):
    """Through safetensors, inside a model, into a layer of other settings."""
    made, _ = layer(**kwargs)
    save_file(torch.nn.Sequential(made).state_dict(), tmp_path / "model.safetensors")
    entries = load_file(tmp_path / "model.safetensors")
    model = torch.nn.Sequential(Linear4bit(64, 48, quant_type="fp4", device=device))
    if device == "meta" and not assign:
        model[0].bias = torch.nn.Parameter(torch.empty(48))
    assert str(model.load_state_dict(entries, strict=True, assign=assign)) == "<All keys matched successfully>"
    loaded = model[0]
    assert torch.equal(loaded(inputs(3, 64)), made(inputs(3, 64)))
    assert isinstance(loaded.weight, Params4bit) and not loaded.weight.requires_grad
    assert loaded.weight.quant_type == "nf4" and loaded.quant_storage == kwargs.get("quant_storage", torch.uint8)
    saved = model.state_dict()
    assert all(torch.equal(quant.packed_bytes(saved[key]), quant.packed_bytes(entries[key])) for key in entries)


def test_loading_reports_what_is_missing():
    entries = layer()[0].state_dict()
    del entries["bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        Linear4bit(64, 48).load_state_dict(entries)
    del entries["weight.absmax"]
    with pytest.raises(ValueError, match="absmax"):
        Linear4bit(64, 48).load_state_dict(entries)


def test_bitsandbytes_loads_our_entries():
    peer = pytest.importorskip("bitsandbytes")
    made, _ = layer()
    entries = {key.removeprefix("weight."): v for key, v in made.state_dict().items() if key.startswith("weight.")}
    weight = peer.nn.Params4bit.from_prequantized(made.weight.detach(), entries, device="cpu")
    theirs = peer.functional.dequantize_4bit(weight, weight.quant_state)
    assert torch.equal(theirs, quant.dequantize_4bit(made.weight.detach(), made.quant_state))


def test_copies_are_independent():
    made, _ = layer()
    other = copy.deepcopy(made)
    assert torch.equal(other(inputs(1, 64)), made(inputs(1, 64)))
    assert other.weight.module is other and other.weight.quant_state is other.quant_state
    assert other.quant_state is not made.quant_state
    other.weight.data.zero_()
    assert made.weight.detach().any()


def test_a_copy_made_before_quantization_quantizes_itself():
    made = Linear4bit(64, 48)
    other = copy.deepcopy(made).to("cpu")
    assert made.quant_state is None and other.quant_state is not None


def test_pickle():
    made, _ = layer()
    other = pickle.loads(pickle.dumps(made))
    assert torch.equal(other(inputs(1, 64)), made(inputs(1, 64)))
    assert isinstance(other.weight, Params4bit) and other.weight.module is other


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_leave_packed_bytes(storage, cast):
    made, _ = layer(quant_storage=storage)
    before = quant.packed_bytes(made.weight.detach()).clone()
    getattr(made, cast)()
    assert made.weight.dtype == storage and torch.equal(quant.packed_bytes(made.weight.detach()), before)
    made.to(torch.float16)
    assert torch.equal(quant.packed_bytes(made.weight.detach()), before) and made.bias.dtype == torch.float16
    x = inputs(2, 64, dtype=torch.float16)
    assert made(x).dtype == torch.float16


def test_a_weight_that_lost_its_state_gets_it_back():
    made, _ = layer()
    state, expected = made.quant_state, made(inputs(2, 64))
    made.weight.quant_state = None
    assert torch.equal(made(inputs(2, 64)), expected) and made.weight.quant_state is state


def test_state_survives_a_weight_turned_into_a_plain_parameter():
    """As FSDP does: only the layer still knows the state."""
    made, _ = layer()
    expected = made(inputs(2, 64))
    made.weight = torch.nn.Parameter(made.weight.detach(), requires_grad=False)
    assert torch.equal(made(inputs(2, 64)), expected)
    assert "weight.quant_state.bitsandbytes__nf4" in made.state_dict()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="2.4 and 2.6 break the graph at a tensor subclass's attributes")
@pytest.mark.parametrize("kwargs", [{}, {"quant_storage": torch.float32}, {"compute_dtype": torch.bfloat16}], ids=str)
def test_compiles_to_one_graph(kwargs):
    made, _ = layer(**kwargs)
    model = torch.nn.Sequential(made, torch.nn.ReLU(), layer(48, 64, **kwargs)[0])
    x = inputs(3, 64).requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, model(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(model(x).sum(), x)[0])
