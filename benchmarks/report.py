"""The tables of README.md and RESULTS.md, from the results beside them.

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`. RESULTS.md has one for each benchmark and number of
threads, with all of its cases; README.md those below, with the cases that say most, and words of its own for them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

HERE = Path(__file__).parent
RESULTS, README = HERE / "RESULTS.md", HERE.parent / "README.md"
_MARK = r"(<!-- measured: {} -->\n).*?(<!-- end -->)"


@dataclass
class Table:
    """A case's row is called by its name unless it says otherwise. CPU time with one thread, wall time with more."""

    head: str
    cases: dict[str, str | None]
    threads: int = 1


TABLES = {
    "kernels": Table(
        "| NF4, blocks of 64 | pyqlora | bitsandbytes | ratio | torch, dense | ratio |",
        {
            "quantize 4096x4096 fp32": None,
            "quantize 4096x4096 bf16": None,
            "dequantize 4096x4096 fp32": None,
            "dequantize 4096x4096 bf16": None,
            "dequantize in pieces into a reused 512 KiB workspace 4096x4096 fp32": (
                "dequantize into a reused 512 KiB workspace 4096x4096 fp32"
            ),
            "dequantize, every result kept, 4096x4096 fp32": None,
            "forward M=1 4096x4096 fp32": None,
            "forward M=1 4096x4096 bf16": None,
            "forward M=1 4096x4096 fp32, activations in int16": None,
            "forward M=8 4096x4096 fp32": None,
            "forward M=64 4096x4096 fp32": None,
            "forward M=512 4096x4096 fp32": None,
            "forward+backward M=512 1536x576 fp32": None,
            "forward+backward M=512 1536x576 bf16": None,
        },
    ),
    "steps": Table(
        "| SmolLM2-135M's shape, r=16 on all seven projections "
        "| pyqlora | bitsandbytes + PEFT | ratio | PEFT, dense | ratio |",
        {
            "step 1x256 fp32, each at its best": "training step, 1×256 tokens, fp32, each at its best",
            "step 1x256 fp32, plain checkpointing": "… plain checkpointing",
            "step 4x256 fp32, each at its best": "training step, 4×256 tokens, fp32, each at its best",
            "step 4x256 fp32, plain checkpointing": "… plain checkpointing",
            "step 1x64 bf16, each at its best": "training step, 1×64 tokens, bf16, each at its best",
            "step 1x64 bf16, plain checkpointing": "… plain checkpointing",
            "step 4x256 bf16, each at its best": "training step, 4×256 tokens, bf16, each at its best",
            "decode 16 tokens fp32": "generate 16 tokens, fp32",
            "decode 16 tokens bf16, bitsandbytes fp32": "generate 16 tokens, bf16, bitsandbytes in its faster fp32",
        },
    ),
    "threads": Table(
        "| the same with two threads, wall time | pyqlora | bitsandbytes + PEFT | ratio | PEFT, dense | ratio |",
        {
            "step 1x256 fp32, each at its best": "training step, 1×256 tokens, fp32, each at its best",
            "step 4x256 fp32, each at its best": "training step, 4×256 tokens, fp32, each at its best",
            "step 1x64 bf16, each at its best": "training step, 1×64 tokens, bf16, each at its best",
            "decode 16 tokens fp32": "generate 16 tokens, fp32",
        },
        threads=2,
    ),
    "optimizers": Table(
        "| optimizer step over the 420 LoRA tensors of SmolLM2-135M (4.88 M parameters) "
        "| pyqlora | bitsandbytes | ratio | torch's fused AdamW, float32 | ratio |",
        {
            f"{name}, 420 LoRA tensors": name
            for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW32bit", "PagedAdamW32bit")
        },
    ),
}


def part(benchmark: str, threads: int) -> str:
    """The name under which a benchmark's results with so many threads are kept."""
    return benchmark if threads == 1 else f"{benchmark}, {threads} threads"


def keep(file: Path, name: str, machine: dict[str, str], results: list[dict[str, Any]]) -> None:
    """A `part`'s results into a file, in the places of former ones of these cases; the machine is the last run's."""
    everything = json.loads(file.read_text()) if file.exists() else {}
    former = everything.get(name, {"results": []})["results"]
    cases = {result["case"]: result for result in [*former, *results]}
    everything[name] = {"machine": machine, "results": list(cases.values())}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
    temporary.rename(file)


def write(file: Path, results: Path = RESULTS, readme: Path = README) -> None:
    """The tables anew from a file of results; those whose cases are not all in it stay as they are."""
    everything = json.loads(file.read_text())
    cases: dict[int, dict[str, dict]] = {}
    for name, own in everything.items():
        threads = int(own["machine"]["threads"])
        cases.setdefault(threads, {}).update((result["case"], result["runs"]) for result in own["results"])
        rows = "\n".join(harness.row(result, threads) for result in own["results"])
        machine = "\n".join(f"{key}: {value}" for key, value in own["machine"].items())
        _put(results, name, f"```\n{machine}\n```\n\n{harness.header(threads)}\n{rows}")
    for name, table in TABLES.items():
        measured = cases.get(table.threads, {})
        if measured.keys() >= table.cases.keys():
            time = "cpu_ms" if table.threads == 1 else "wall_ms"
            rows = [_row(label or case, measured[case], time) for case, label in table.cases.items()]
            _put(readme, name, "\n".join([table.head, "|---" * table.head.count(" | ") + "|---|", *rows]))


def _row(label: str, runs: dict[str, dict[str, float]], time: str) -> str:
    ours = runs["pyqlora"][time]
    cells = [label, _number(ours)]
    for peer in harness.PEERS:
        theirs = runs[peer][time] if peer in runs else None
        cells += (
            ["–", "–"] if theirs is None else [_number(theirs), f"{theirs / ours:.{1 if theirs / ours < 10 else 0}f}×"]
        )
    return f"| {' | '.join(cells)} |"


def _number(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def _put(file: Path, name: str, table: str) -> None:
    text = file.read_text()
    text, count = re.subn(_MARK.format(re.escape(name)), lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if not count:
        raise ValueError(f"{file}: no place for the table: <!-- measured: {name} -->, then <!-- end -->")
    file.write_text(text)
