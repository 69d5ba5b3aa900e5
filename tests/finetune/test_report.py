from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

import tiny_model

from pyqlora.finetune.data import Sample
from pyqlora.finetune.encode import encode
from pyqlora.finetune.loop import Record
from pyqlora.finetune.report import Log, Score, choose_probes, plot


def record(step: int) -> Record:
    return Record(step, 1.0 / step, 1e-3, 0.5, 10, 0.1)


def test_probes_are_prompts_and_what_follows_them():
    tokenizer = tiny_model.tokenizer()
    samples = encode([Sample("x", prompt=f"{i} in", completion=" a b") for i in range(5)], tokenizer, 64).samples
    probes = choose_probes(samples, 3, tokenizer)
    assert probes.texts == ["0 in", "1 in", "2 in"]
    assert probes.expected == ["a b"] * 3


def test_a_text_block_is_continued_from_its_middle():
    tokenizer = tiny_model.tokenizer()
    samples = encode([Sample("x", text="abcdefgh")], tokenizer, 8).samples
    probes = choose_probes(samples, 1, tokenizer)
    assert (probes.texts, probes.expected) == (["abcd"], ["efgh"])


def test_accuracy():
    assert Score(1.0, [" açık ", "kapi"]).accuracy(["açık", "kapı"]) == (0.5, 0.875)


def test_log_keeps_the_steps_before_a_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.add(record(step))
    log.close()
    again = Log(path, 2)  # step 3 came after the checkpoint
    again.add(record(3))
    again.close()
    assert again.records == [record(1), record(2), record(3)]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("losses", [(None, None), (2.0, 1.0)])
def test_plot(tmp_path, losses):
    plot(tmp_path / "loss.png", [record(1), record(2)], *losses)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
