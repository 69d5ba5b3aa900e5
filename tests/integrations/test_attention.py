"""Attention in float32 on a CPU without 16-bit matrix instructions."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_model
import torch

import pyqlora
from pyqlora.integrations import attention


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request, monkeypatch):
    monkeypatch.setattr(attention, "_is_native", lambda dtype: False)
    return request.param


def run(model, ids, mask):
    model.train().zero_grad()
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids)
    outputs.loss.backward()
    return outputs.logits.detach(), model.get_input_embeddings().weight.grad


@pytest.mark.parametrize("padded", [False, True])
def test_is_nearer_to_float32_and_keeps_dtypes(dtype, padded):
    exact = tiny_model.model()
    plain = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(plain).float()  # of the rounded weights
    changed = copy.deepcopy(plain)
    assert attention.use_float32_attention(changed)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = 0
    logits, grad = run(changed, ids, mask)
    assert logits.dtype == grad.dtype == dtype
    seen = mask.bool()
    want, want_grad = run(exact, ids, mask)
    before, before_grad = run(plain, ids, mask)
    assert (logits - want)[seen].abs().mean() <= (before - want)[seen].abs().mean() * 1.05
    assert (grad - want_grad).abs().mean() <= (before_grad - want_grad).abs().mean() * 1.05
    assert torch.equal(changed.eval()(ids).logits, plain.eval()(ids).logits)


def test_prepare_switches_16_bit_models_only(dtype, tmp_path):
    model = pyqlora.prepare_model_for_kbit_training(tiny_model.model().to(dtype))
    assert model.config._attn_implementation == attention.IMPLEMENTATION
    assert not attention.use_float32_attention(model)  # once is enough
    model.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    wide = pyqlora.prepare_model_for_kbit_training(tiny_model.model())
    assert wide.config._attn_implementation == "sdpa"
    eager = tiny_model.model().to(dtype)
    eager.set_attn_implementation("eager")
    assert not attention.use_float32_attention(eager)
    assert not attention.use_float32_attention(torch.nn.Linear(2, 2, dtype=dtype))


def test_a_cpu_with_the_instructions_is_left_alone(monkeypatch):
    monkeypatch.setattr(attention, "_is_native", lambda dtype: True)
    assert not attention.use_float32_attention(tiny_model.model().to(torch.bfloat16))
