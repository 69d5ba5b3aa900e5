"""Loading a checkpoint of bfloat16 shards into 4 bits, and a checkpoint in 4 bits: time and memory beside bitsandbytes.

`python -m benchmarks.load [llama-3.2-1b] [--directory DIR] [--rounds 3]`

Every load has a process of its own, in which a tiny model was loaded before (modules that the first load imports are
not counted); implementations take turns. "Copy" copies every tensor out of the mapped shards, one at a time: the
memory's copy rate; "read" reads the files past the system's cache: the disk's rate (it needs files that are on the
disk). Memory is the peak over what the process had before. It should be no more than the quantized model and the two
largest tensors that are quantized.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - imported before the children are forked, as are those below
import torch
import transformers
import transformers.models.llama.modeling_llama
from safetensors import safe_open

from benchmarks import models
from benchmarks.meter import Meter, in_child
from benchmarks.shards import SIZES, write_shards

TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
HEADER = """| | wall s | CPU s | GB/s (CPU) | MB at most | allowed |
|---|---|---|---|---|---|"""
READ_BYTES = 16 << 20


def bytes_of(path: Path) -> int:
    """The size of a checkpoint's files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def quantized(path: Path, tiny: Path, implementation: str) -> dict[str, float]:
    """Load to NF4 with double quantization, or a checkpoint that is; in a process of its own."""
    models.load(implementation, tiny, torch.bfloat16)
    meter = Meter()
    with meter("load") as part:
        model = models.load(implementation, path, torch.bfloat16)
    sizes = sorted(2 * p.quant_state.shape.numel() for p in model.parameters() if hasattr(p, "quant_state"))
    constants = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        constants += 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    allowed = sum(p.nbytes for p in model.parameters()) + constants + sum(sizes[-2:])
    return {"wall_s": part.wall_s, "cpu_s": part.cpu_s, "added": part.peak - part.before, "allowed": allowed}


def copy(path: Path) -> dict[str, float]:
    """Every tensor out of the mapped files, as a loader that changes nothing would."""
    meter = Meter()
    with meter("copy") as part:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    tensors.get_tensor(name).clone()
    return {"wall_s": part.wall_s, "cpu_s": part.cpu_s, "added": part.peak - part.before}


def read(path: Path) -> dict[str, float]:
    """The files, past the system's cache."""
    buffer, meter = bytearray(READ_BYTES), Meter()
    with meter("read") as part:
        for file in sorted(path.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while stream.readinto(buffer):
                    pass
    return {"wall_s": part.wall_s, "cpu_s": part.cpu_s, "added": part.peak - part.before}


def save(path: Path, target: Path) -> None:
    """The quantized checkpoint of a bfloat16 one."""
    models.load("pyqlora", path, torch.bfloat16).save_pretrained(target)


def measured(path: Path, four_bits: Path, tiny: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every round of every case, by its name."""
    cases = {"read from the disk": (read, path)}
    cases |= {"copy": (copy, path)}
    for implementation in ("pyqlora", "bitsandbytes"):
        cases[f"bf16 to NF4: {implementation}"] = (quantized, path, tiny, implementation)
    for implementation in ("pyqlora", "bitsandbytes"):
        cases[f"from NF4: {implementation}"] = (quantized, four_bits, tiny, implementation)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            samples[name].append(in_child(*case))
    return samples


def row(name: str, samples: list[dict[str, float]], size: int) -> str:
    """A table line: medians, the highest peak."""
    wall, cpu = (statistics.median(sample[key] for sample in samples) for key in ("wall_s", "cpu_s"))
    peak = max(sample["added"] for sample in samples) / 1e6
    allowed = f"{samples[0]['allowed'] / 1e6:,.0f}" if "allowed" in samples[0] else "–"
    return f"| {name} | {wall:.2f} | {cpu:.2f} | {size / max(cpu, 1e-3) / 1e9:.2f} | {peak:,.0f} | {allowed} |"


def main(given: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=SIZES, default="llama-3.2-1b")
    parser.add_argument("--directory", type=Path, help="where the shards are or shall be [a temporary one]")
    parser.add_argument("--layers", type=int, help="fewer or more than the model has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every round here")
    arguments = parser.parse_args(given)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sizes = SIZES[arguments.model] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        path = arguments.directory or here / arguments.model
        in_child(write_shards, path, sizes)
        in_child(write_shards, here / "tiny", TINY)
        in_child(save, path, here / "nf4")
        samples = measured(path, here / "nf4", here / "tiny", arguments.rounds)
        files = {"from": bytes_of(here / "nf4"), "bf16": bytes_of(path)}
    print(f"{files['bf16'] / 1e9:.2f} GB in bfloat16, {files['from'] / 1e9:.2f} GB in 4 bits, one thread\n\n{HEADER}")
    for name, rounds in samples.items():
        print(row(name, rounds, files.get(name.split()[0], files["bf16"])))
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": files, "rounds": samples}, indent=1))
    return samples


if __name__ == "__main__":
    main()
