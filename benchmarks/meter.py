"""Time and peak memory of the parts of a process, one after the other (Linux: /proc)."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def hide_gpus() -> None:
    """Before anything counts them: a backward pass begins a thread and a context for each, in the memory that is
    measured here, and a process that has those threads cannot fork children with backward passes of their own.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def resident() -> int:
    """Bytes of memory that the process has now, mapped files included."""
    return _status("VmRSS:")


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024


@dataclass
class Part:
    """What one part took: seconds, and bytes resident before, at the highest moment and after."""

    name: str
    wall_s: float = 0.0
    cpu_s: float = 0.0
    system_s: float = 0.0
    before: int = 0
    peak: int = 0
    after: int = 0


class Meter:
    """Collects parts; `with meter("load"):` measures one. The kernel's own highest-water mark is reset for each."""

    def __init__(self):
        self.parts: list[Part] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[Part]:
        part = Part(name, before=resident())
        Path("/proc/self/clear_refs").write_text("5")
        wall, used = time.perf_counter(), _times()
        try:
            yield part
        finally:
            now = _times()
            part.wall_s = time.perf_counter() - wall
            part.cpu_s, part.system_s = sum(now) - sum(used), now[1] - used[1]
            part.after = resident()
            part.peak = max(_status("VmHWM:"), part.before, part.after)  # the counters are exact to a few pages
            self.parts.append(part)

    def peak(self) -> int:
        """The highest of all parts, bytes."""
        return max(part.peak for part in self.parts)


def _times() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


HEADER = (
    "| part | wall s | CPU s | of these system | GB before | GB at most | GB after |\n|---|---|---|---|---|---|---|"
)


def row(part: Part) -> str:
    """A table line."""
    memory = " | ".join(f"{size / 1e9:.2f}" for size in (part.before, part.peak, part.after))
    return f"| {part.name} | {part.wall_s:.1f} | {part.cpu_s:.1f} | {part.system_s:.1f} | {memory} |"


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a forked process: with all imports done, and memory of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)
