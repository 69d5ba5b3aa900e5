"""transformers' models with pyqlora's rotary position embedding."""

from __future__ import annotations

import sys
import types

import pytest
import tiny
import torch

import pyqlora
from pyqlora import _C
from pyqlora.integrations.rotary import NAME, use_cpu_rotary
from pyqlora.ops import rotary

transformers = pytest.importorskip("transformers")

# Whether the function in the model's file is the formula: GLM's turns neighbours, of a part of each head.
MODELS = {"Llama": True, "Mistral": True, "Qwen2": True, "Qwen3": True, "Gemma": True, "Glm": False}


def restore():
    """Every file's function is its own again."""
    for module in list(sys.modules.values()):
        function = vars(module).get(NAME) if isinstance(module, types.ModuleType) else None
        if hasattr(function, "_switched_from"):
            setattr(module, NAME, function._switched_from)


@pytest.fixture(autouse=True)
def restored():
    restore()  # other tests load models too
    yield
    restore()


@pytest.fixture
def calls(monkeypatch):
    """The number of rotations by the operation."""
    calls = []
    rotated = rotary._rotated
    monkeypatch.setattr(rotary, "_rotated", lambda x, *rest: calls.append(x) or rotated(x, *rest))
    return calls


def build(name="Llama", dtype=torch.float32):
    model = tiny.causal_lm(name, head_dim=8)
    tiny.randomize(model)
    return model.to(dtype)


def ids():
    return torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def run(model):
    """(loss, gradients by name)."""
    model.train().zero_grad()
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name, dtype, calls):
    model = build(name, dtype)
    want, want_grads = run(model)
    logits = model.eval()(ids()).logits
    text = model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert use_cpu_rotary(model) == MODELS[name]
    calls.clear()
    loss, grads = run(model)
    assert len(calls) == (8 if MODELS[name] else 0)  # of q and k, in two layers, there and back
    assert torch.equal(loss, want) and grads.keys() == want_grads.keys()
    if name == "Qwen3":  # norms before it: torch sums their gradients in an order that depends on the layout
        torch.testing.assert_close(grads, want_grads, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    else:
        assert all(torch.equal(grads[key], want_grads[key]) for key in grads)
    assert torch.equal(model.eval()(ids()).logits, logits)
    assert torch.equal(model.generate(ids(), max_new_tokens=4, do_sample=False), text)
    assert use_cpu_rotary(model) == 0  # once is enough


def test_what_is_not_the_formula_stays(monkeypatch):
    original = transformers.models.llama.modeling_llama.apply_rotary_pos_emb

    def switched(function):
        file = types.ModuleType("rotary_file")
        setattr(file, NAME, function)
        monkeypatch.setitem(sys.modules, "rotary_file", file)
        layer = type("Layer", (torch.nn.Module,), {"__module__": "rotary_file"})()
        return use_cpu_rotary(layer) and getattr(file, NAME)

    assert switched(original)._switched_from is original
    for other in (
        lambda q, k, cos, sin: original(q, k, sin, cos),
        lambda q, k, cos, sin: list(original(q, k, cos, sin)),
        lambda q, k, cos, sin: (original(q, k, cos, sin)[0], k),
        lambda query, key, c, s: original(query, key, c, s),
        lambda q, k, cos, sin, positions: original(q, k, cos, sin),
        "not a function",
    ):
        assert not switched(other)


def test_other_calls_go_to_the_function_that_was_there(calls):
    model = build()
    file = transformers.models.llama.modeling_llama
    original = getattr(file, NAME)
    use_cpu_rotary(model)
    function = getattr(file, NAME)
    assert function.__name__ == NAME and function.__doc__ == original.__doc__
    q, k, angles = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 2, 5, 8)
    calls.clear()
    got = function(q, k, *angles, unsqueeze_dim=2)
    assert all(map(torch.equal, got, original(q, k, *angles, unsqueeze_dim=2))) and not calls
    by_name = function(q=q.transpose(1, 2), k=k.transpose(1, 2), cos=angles[0], sin=angles[1])
    assert all(map(torch.equal, by_name, (t.transpose(1, 2) for t in got))) and len(calls) == 2
    run(model.double())
    model.to("meta")(ids().to("meta"))
    assert len(calls) == 2


def test_who_switches_it(tmp_path, calls):
    file = transformers.models.llama.modeling_llama
    original = getattr(file, NAME)
    with torch.device("meta"):
        assert use_cpu_rotary(build()) == 0
    _C.cpu.set_isa("scalar")
    try:
        assert use_cpu_rotary(build()) == 0
    finally:
        _C.cpu.set_isa("")
    pyqlora.prepare_model_for_kbit_training(build())
    assert getattr(file, NAME)._switched_from is original
    setattr(file, NAME, original)
    build().save_pretrained(tmp_path)
    config = pyqlora.BitsAndBytesConfig(load_in_4bit=True)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert getattr(file, NAME)._switched_from is original


def test_compiled_models_trace_the_formula(calls):
    model = build()
    want, _ = run(model)
    use_cpu_rotary(model)
    calls.clear()
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=ids(), labels=ids()).loss
    loss.backward()
    torch.testing.assert_close(loss, want)
    assert not calls
