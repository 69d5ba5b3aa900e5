from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import tiny_model

from pyqlora.finetune.data import Sample
from pyqlora.finetune.encode import encode
from pyqlora.finetune.plan import SAMPLE_TOKENS, duration, mark, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "2 kB"), (168e6, "168 MB"), (2.512e9, "2.51 GB"), (4e12, "4000.00 GB")],
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_mark():
    tokenizer = tiny_model.tokenizer()
    (sample,) = encode([Sample("x", prompt="ab", completion=" cd")], tokenizer, 64).samples
    assert mark(sample, tokenizer) == [("ab", False), (" cd</s>", True)]
    (long,) = encode([Sample("x", text="b" * 200)], tokenizer, 500).samples
    assert mark(long, tokenizer) == [("b", False), ("b" * (SAMPLE_TOKENS - 1), True), (" …", False)]
