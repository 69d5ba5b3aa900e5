from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

import tiny_model

from pyqlora.finetune.batches import Order
from pyqlora.finetune.data import Sample
from pyqlora.finetune.encode import encode
from pyqlora.finetune.loop import Loop, learning_rate


def loop(batch_size: int, grad_accum: int, count: int = 8, lr: float = 1e-2) -> Loop:
    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    data = [Sample("x", prompt="in", completion=" a" * (1 + i % 4)) for i in range(count)]
    samples = encode(data, tokenizer, 64).samples
    order = Order([len(s.ids) for s in samples], batch_size, grad_accum, 0)
    return Loop(model, torch.optim.AdamW(model.parameters()), samples, order, 5, lr, tokenizer.pad_token_id)


def test_learning_rate():
    rates = [learning_rate(step, 100, 1.0) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(1, 1, 1.0) == 1.0


def test_accumulated_gradients_are_those_of_one_batch():
    """Loss and gradient are means over tokens, however the samples are cut into micro-batches."""
    whole, parts = loop(8, 1), loop(3, 3)
    loss, tokens = whole.backward(0)
    assert parts.backward(0) == (pytest.approx(loss, rel=1e-5), tokens)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_goes_down_and_records_say_so():
    trained = loop(8, 1)
    records = [trained.step(number) for number in range(1, 6)]
    assert records[-1].loss < records[0].loss
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    assert records[0].lr == 1e-2
    assert all(record.tokens == sum(len(s.ids) for s in trained.samples) for record in records)


def test_timing_a_step_changes_nothing():
    timed, fresh = loop(3, 2), loop(3, 2)
    before = torch.get_rng_state()
    assert timed.seconds_per_step() > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert timed.step(1).loss == fresh.step(1).loss
    assert all(torch.equal(a, b) for a, b in zip(timed.parameters, fresh.parameters, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run():
    broken = loop(8, 1)
    broken.parameters[0].data.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"the loss became nan at step 1: try a lower --lr than 0\.01"):
        broken.step(1)
