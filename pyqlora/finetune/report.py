"""What a run leaves behind: log.jsonl, loss.png, the adapter, and the numbers before and after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqlora.finetune.encode import Encoded
from pyqlora.finetune.evaluate import character_accuracy, complete, mean_loss
from pyqlora.finetune.files import whole_file
from pyqlora.finetune.loop import Record

GENERATIONS = 3
NEW_TOKENS = 64


@dataclass(frozen=True)
class Score:
    """The state of the model at one time: held-out loss, and completions of a few prompts."""

    loss: float | None
    completions: list[str]

    def accuracy(self, expected: Sequence[str]) -> tuple[float, float]:
        """Shares of exact matches and of right characters."""
        texts = [text.strip() for text in self.completions]
        exact = sum(a == b for a, b in zip(texts, expected, strict=True)) / len(expected)
        return exact, character_accuracy(texts, expected)


@dataclass(frozen=True)
class Probes:
    """Prompts that are completed before and after, and what the data has there."""

    prompts: list[list[int]]
    texts: list[str]
    expected: list[str]
    new_tokens: int


def choose_probes(samples: Sequence[Encoded], count: int, tokenizer: Any) -> Probes:
    """The first `count` samples' prompts; of a sample trained from its first token on, the first half is the prompt."""
    pairs = []
    for sample in samples[:count]:
        prompt, completion = sample.prompt, sample.completion
        if len(prompt) == 1 and len(completion) > 1:
            middle = min(len(sample.ids) // 2, NEW_TOKENS)
            prompt, completion = sample.ids[:middle], sample.ids[middle:]
        pairs.append((prompt, completion[:NEW_TOKENS]))

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    return Probes(
        [prompt for prompt, _ in pairs],
        [decode(prompt) for prompt, _ in pairs],
        [decode(completion) for _, completion in pairs],
        min(NEW_TOKENS, max(len(completion) for _, completion in pairs) + 4),
    )


def score(model: Any, held_out: Sequence[Encoded], probes: Probes, tokenizer: Any) -> Score:
    """Measure the model as it is now."""
    loss = mean_loss(model, held_out, tokenizer.pad_token_id) if held_out else None
    return Score(loss, complete(model, probes.prompts, tokenizer, probes.new_tokens))


class Log:
    """log.jsonl: one line per step, flushed as it is written.

    Args:
        path: the file; lines of steps after `keep` are dropped, since a resumed run takes them again.
        keep: steps taken so far.
    """

    def __init__(self, path: Path, keep: int):
        lines = path.read_text(encoding="utf-8").splitlines() if keep and path.exists() else []
        self.records = [Record(**values) for values in map(json.loads, lines) if values["step"] <= keep]
        with whole_file(path) as temporary:
            temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append a step."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"


def plot(path: Path, records: Sequence[Record], before: float | None, after: float | None) -> None:
    """loss.png: the loss of each step, its running mean, and the held-out loss before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses, mean = [r.step for r in records], [r.loss for r in records], []
    for loss in losses:
        mean.append(loss if not mean else 0.9 * mean[-1] + 0.1 * loss)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps, mean, color="C0", label="running mean")
    if before is not None and after is not None:
        axes.plot([0, steps[-1]], [before, after], "o", color="C3", label="held out, before and after")
    axes.set(xlabel="step", ylabel="loss per trained token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
