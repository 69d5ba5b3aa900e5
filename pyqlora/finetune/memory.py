"""Memory: what is free, what is used, what a run will need."""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyqlora.estimate import CHECKPOINTING, Run, Shape, parts
from pyqlora.finetune.options import Options

ADDED = ("optimizer", "activations", "logits", "workspace")
COMFORTABLE = 0.7  # share of the free memory that a run may take before it recomputes more of its activations


M_MMAP_THRESHOLD, MMAP_BYTES = -3, 256 << 10  # malloc.h; what glibc starts with, until the first large tensor is freed


@dataclass(frozen=True)
class Estimate:
    """Bytes: what the process holds with the model loaded, what training adds by part, and what is free for it."""

    now: int
    model: int
    added: dict[str, int]
    free: int
    checkpointing: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.now + sum(self.added.values())


def free_bytes(device: torch.device) -> int:
    """Memory that is still available on the device: the GPU's, or the machine's within its cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(available, limit - used)
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return available


def used_bytes(device: torch.device) -> int:
    """Memory in use now: the GPU's allocations, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The highest use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def estimate(model: Any, options: Options, batch: int, length: int, labelled: int, dtype: torch.dtype) -> Estimate:
    """What training will need; where that would not fit well, activations are recomputed, as few as possible.

    Args:
        model: the model under its adapter.
        options: for the optimizer.
        batch: samples of the largest micro-batch.
        length: tokens of its longest sample.
        labelled: labels in it.
        dtype: of the computation.
    """
    device = next(model.parameters()).device
    shape = Shape.of(model.get_base_model())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = Run(batch, length, trained, dtype.itemsize, options.optim, labelled=labelled, on_cpu=device.type == "cpu")
    free = free_bytes(device)
    for checkpointing in CHECKPOINTING:
        needs = parts(shape, "QLoRA", replace(run, checkpointing=checkpointing))
        if sum(needs[part] for part in ADDED) <= COMFORTABLE * free:
            break
    added = {part: needs[part] for part in ADDED} | {"gradients": 4 * trained}
    return Estimate(used_bytes(device), needs["weights"] + needs["constants"], added, free, checkpointing)


def return_freed_memory() -> None:
    """Have glibc return every large tensor's memory as it is freed, at the cost of page faults.

    By default it raises its threshold for this to 32 MiB and keeps smaller ones for reuse, which fails: an aligned
    block needs a larger gap than the one that a block of the same size leaves. Training with recomputed activations,
    which frees nearly all of what it allocates, then grows by a layer's temporaries with every layer.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
