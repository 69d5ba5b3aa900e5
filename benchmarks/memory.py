"""What training adds to a process's memory at 4x256 tokens, beside the peers: `python -m benchmarks.memory`.

SmolLM2-135M's shape as in bench_step, float32, one thread, every case in a process of its own: the highest moment of
three steps over what the process had before the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.bench_step import DROPOUT, stepper
from benchmarks.meter import Meter, in_child

BATCH, LENGTH, STEPS = 4, 256, 3
CASES = {
    "pyqlora, plain checkpointing": ("pyqlora", False),
    "pyqlora, selective checkpointing": ("pyqlora", True),
    "bitsandbytes + PEFT": ("bitsandbytes", False),
    "PEFT, dense": ("torch dense", False),
    "PEFT, dense, selective checkpointing": ("torch dense", True),
}


def added(implementation: str, selective: bool) -> int:
    """Bytes."""
    torch.set_num_threads(1)
    path = models.checkpoint(**models.SMOLLM2_135M)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, models.SMOLLM2_135M["vocab_size"], (BATCH, LENGTH), generator=generator)
    model = models.adapted(implementation, path, torch.float32, 16, DROPOUT, selective)
    step, meter = models.as_installed(implementation, stepper(model, ids)), Meter()
    with meter("steps") as part:
        for _ in range(STEPS):
            step()
    return part.peak - part.before


def main(given: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the bytes here")
    arguments = parser.parse_args(given)
    print(f"| {BATCH}x{LENGTH} tokens, fp32 | MB added |\n|---|---|")
    results = {}
    for name, case in CASES.items():
        results[name] = in_child(added, *case)
        print(f"| {name} | {results[name] / 1e6:,.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
