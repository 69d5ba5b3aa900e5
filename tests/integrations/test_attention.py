"""transformers' models training with pyqlora's attention."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import tiny_model
import torch

import pyqlora
from pyqlora import _C
from pyqlora.integrations import attention
from pyqlora.ops import attention as operation


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request, monkeypatch):
    monkeypatch.setattr(attention, "_is_native", lambda dtype: False)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Whether each call was causal and had a mask."""
    calls = []
    apply = operation._Attention.apply
    monkeypatch.setattr(
        operation._Attention, "apply", lambda *args: calls.append((args[4], args[3] is not None)) or apply(*args)
    )
    return calls


def run(model, ids, mask):
    model.train().zero_grad()
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    outputs.loss.backward()
    return outputs.logits.detach(), model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_is_as_near_to_float64_and_keeps_dtypes(dtype, padding, calls):
    plain = tiny_model.model().to(dtype)
    exact = copy.deepcopy(plain).double()  # of the rounded weights
    changed = copy.deepcopy(plain)
    assert attention.use_cpu_attention(changed)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, :7] = 0
        mask = mask if padding == "left" else mask.flip(1)
    logits, grad = run(changed, ids, mask)
    assert calls == [(padding == "none", padding != "none")] * 2
    assert logits.dtype == grad.dtype == dtype
    seen = mask.bool()
    want, want_grad = run(exact, ids, mask)
    before, before_grad = run(plain, ids, mask)
    slack = 1.5  # all else in the model is rounded as before
    assert (logits - want)[seen].abs().mean() <= (before - want)[seen].abs().mean() * slack
    assert (grad - want_grad).abs().mean() <= (before_grad - want_grad).abs().mean() * slack
    assert torch.equal(changed.eval()(ids).logits, plain.eval()(ids).logits)


def test_other_models_and_arguments_go_to_sdpa(calls):
    model = tiny.llama(attention_dropout=0.5)
    assert attention.use_cpu_attention(model)
    ids = torch.randint(1, 60, (2, 6))
    model.train()(input_ids=ids)
    assert not calls
    model = tiny.llama()
    attention.use_cpu_attention(model)
    model.double().train()(input_ids=ids)
    assert not calls
    layer = model.float().model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    want, _ = attention.attention_forward(layer.eval(), q, k, v, None)
    assert not calls
    got, _ = attention.attention_forward(layer.train(), q, k, v, None)
    assert calls == [(True, False)]
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="softcap"):
        attention.attention_forward(layer, q, k, v, None, softcap=2.0)


def test_prepare_switches_models_on_the_cpu(dtype, tmp_path):
    model = pyqlora.prepare_model_for_kbit_training(tiny_model.model().to(dtype))
    assert model.config._attn_implementation == attention.IMPLEMENTATION
    assert not attention.use_cpu_attention(model)  # once is enough
    model.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    eager = tiny_model.model().to(dtype)
    eager.set_attn_implementation("eager")
    assert not attention.use_cpu_attention(eager)
    assert not attention.use_cpu_attention(torch.nn.Linear(2, 2, dtype=dtype))


def test_what_gains_nothing_is_left_alone(monkeypatch):
    monkeypatch.setattr(attention, "_is_native", lambda dtype: dtype == torch.bfloat16)
    assert not attention.use_cpu_attention(tiny_model.model().to(torch.bfloat16))
    _C.cpu.set_isa("scalar")
    try:
        assert not attention.use_cpu_attention(tiny_model.model())
    finally:
        _C.cpu.set_isa("")
