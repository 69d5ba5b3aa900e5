"""Timing that survives a busy machine: implementations take turns (A B A B) in one process, CPU time beside wall time,
medians and spread, and no time is taken of a result that was not checked first.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Case:
    """One operation on one shape. `runs`: name -> function; the first one is ours, "bitsandbytes" the peer.

    `before` is called before every run, outside the time measured. What takes minutes may run only `once`.
    """

    name: str
    runs: dict[str, Callable[[], object]]
    check: Callable[[], None]
    before: Callable[[], None] = lambda: None
    once: tuple[str, ...] = ()


def _median(samples: list[float]) -> float:
    return statistics.median(samples)


def measure(case: Case, rounds: int) -> dict:
    """CPU and wall milliseconds of every implementation: median, and the lowest and highest CPU time."""
    case.check()
    for name, run in case.runs.items():
        if name not in case.once:
            run()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in case.runs}
    for _ in range(rounds):
        for name, run in case.runs.items():
            if name in case.once and samples[name]:
                continue
            case.before()
            cpu, wall = time.process_time(), time.perf_counter()
            result = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del result
            samples[name].append((cpu * 1e3, wall * 1e3))
    runs = {}
    for name, pairs in samples.items():
        cpu = [c for c, _ in pairs]
        runs[name] = {
            "cpu_ms": _median(cpu),
            "cpu_ms_min": min(cpu),
            "cpu_ms_max": max(cpu),
            "wall_ms": _median([w for _, w in pairs]),
            "rounds": len(pairs),
        }
    return {"case": case.name, "runs": runs}


PEERS = ("bitsandbytes", "torch dense")


def header(threads: int) -> str:
    """The head of a table, whose times are of the CPU, and with several threads also those on the wall."""
    if threads == 1:
        ours, peer = ["pyqlora ms", "spread", "wall ms"], ["{0} ms", "over {1}"]
    else:
        ours, peer = ["pyqlora CPU ms", "wall ms"], ["{0} CPU ms", "wall ms", "over {1}, CPU", "wall"]
    cells = ["case", *ours, *(cell.format(name, name.split()[-1]) for name in PEERS for cell in peer)]
    return "| " + " | ".join(cells) + " |\n|" + "---|" * len(cells)


def row(result: dict, threads: int) -> str:
    """A table line; a ratio above 1 where pyqlora is faster."""
    runs = result["runs"]
    ours = runs["pyqlora"]
    times = ("cpu_ms",) if threads == 1 else ("cpu_ms", "wall_ms")
    spread = [f"{ours['cpu_ms_min']:.3g}–{ours['cpu_ms_max']:.3g}"] if threads == 1 else []
    cells = [result["case"], f"{ours['cpu_ms']:.3g}", *spread, f"{ours['wall_ms']:.3g}"]
    for peer in PEERS:
        if peer in runs:
            cells += [f"{runs[peer][time]:.3g}" for time in times]
            cells += [f"{runs[peer][time] / ours[time]:.1f}x" for time in times]
        else:
            cells += ["–"] * 2 * len(times)
    return "| " + " | ".join(cells) + " |"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(threads: int) -> dict[str, str]:
    """What the numbers were measured on; sets the number of threads."""
    import bitsandbytes

    import pyqlora
    from pyqlora import _C

    torch.set_num_threads(threads)
    load = Path("/proc/loadavg")
    return {
        "CPU": _cpu_model(),
        "pyqlora": f"{pyqlora.__version__}, kernels {_C.cpu.isa()} (PYQLORA_CPU forces one)",
        "peers": f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}",
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "load average": load.read_text().split()[0] if load.exists() else "unknown",
    }
