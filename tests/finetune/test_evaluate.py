from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

import tiny_model

from pyqlora.finetune.data import Sample
from pyqlora.finetune.encode import IGNORED, encode
from pyqlora.finetune.evaluate import character_accuracy, complete, edit_distance, mean_loss, perplexity


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model.model()


def samples(tokenizer, count=7):
    return encode(
        [Sample("x", prompt="in" * i, completion=f" {i} a") for i in range(1, count + 1)], tokenizer, 64
    ).samples


def test_mean_loss_equals_one_sample_at_a_time_with_all_logits(model, tokenizer):
    total, count = 0.0, 0
    for sample in samples(tokenizer):
        logits = model(torch.tensor([sample.ids])).logits[0, :-1].double()
        labels = torch.tensor(sample.labels[1:])
        total += cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED).item()
        count += int((labels != IGNORED).sum())
    # float32 forward passes of other shapes: a few ulp per operation
    assert mean_loss(model, samples(tokenizer), tokenizer.pad_token_id) == pytest.approx(total / count, rel=1e-5)


def test_a_batch_of_completions_equals_one_at_a_time(model, tokenizer):
    prompts = [sample.prompt for sample in samples(tokenizer)]
    together = complete(model, prompts, tokenizer, 8)
    assert together == [complete(model, [prompt], tokenizer, 8)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("acik", "açık", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


def test_character_accuracy():
    assert character_accuracy(["açık", "x" * 50], ["açık", "kapı"]) == 0.5
    assert character_accuracy(["acik"], ["açık"]) == 0.5


def test_perplexity():
    assert perplexity(0.0) == 1
    assert perplexity(1e4) == math.inf
