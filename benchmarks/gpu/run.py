"""Runs the benchmarks of the CUDA kernels and writes what they found."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from benchmarks.gpu import machine

NAMES = ("quantize", "linear_4bit", "lora_linear", "optim", "training", "decode")


def run(gpu: machine.Gpu, names: list[str], rounds: int, file: Path | None) -> list[dict]:
    """Print a table for each of the benchmarks, and write every number with the machine's name to the JSON file."""
    described = gpu.describe()
    limits = machine.limits(gpu)
    described["measured limits"] = f"{limits.bandwidth / 1e9:.0f} GB/s copying, {limits.flops / 1e12:.0f} TFLOP/s bf16"
    print("\n".join(f"{key}: {value}" for key, value in described.items()))
    results = []
    for name in names:
        print(f"\n## {name}\n\n{machine.HEADER}", flush=True)
        for case in importlib.import_module(f"benchmarks.gpu.{name}").cases(gpu):
            result = machine.measure(gpu, case, limits, rounds)
            print(machine.row(result), flush=True)
            results.append({"benchmark": name, **result})
            if file:  # after every case: what was measured is not lost
                text = json.dumps({"machine": described, "results": results}, indent=1)
                file.with_suffix(".part").write_text(text)
                file.with_suffix(".part").replace(file)
    return results
