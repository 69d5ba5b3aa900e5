"""The GPU that is measured, its limits as measured, and the clock.

A time is the GPU's own, between two events, with everything else evicted from its L2 cache before; the host has queued
the work by then, so that no launch is waited for. Implementations take turns, and the median counts.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

HAVE_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
HAVE_PEFT = HAVE_BITSANDBYTES and importlib.util.find_spec("peft") is not None
HAVE_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@dataclass
class Case:
    """One operation on one shape.

    `runs`: name -> function, ours as "pyqlora"; `bytes` and `flops` are what the operation cannot do without.
    """

    name: str
    runs: dict[str, Callable[[], object]]
    bytes: float = 0
    flops: float = 0
    check: Callable[[], None] = field(default=lambda: None)


class Gpu:
    """The current CUDA device."""

    tiny = False  # whether shapes are to be small

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._evict = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    def describe(self) -> dict[str, str]:
        """Name and versions, for the record."""
        from pyqlora.cli import gpus

        properties = torch.cuda.get_device_properties(self.device)
        return {
            "GPU": f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB",
            "driver": gpus.driver_version(),
            "host": platform.processor() or platform.machine(),
            **versions(),
        }

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """One run's time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._evict.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that replays what `run` launches, captured after a few runs."""
        side = torch.cuda.Stream(self.device)
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def sizes(self, real, small):
        """What a benchmark uses here."""
        return small if self.tiny else real


class Rehearsal(Gpu):
    """The emulated GPU: the same lines on small shapes, timed by the host's clock, for what that is worth."""

    tiny = True

    def __init__(self):
        self.device = torch.device("cpu")

    def describe(self) -> dict[str, str]:
        """That it is none."""
        return {"GPU": "emulated", **versions()}

    def synchronize(self) -> None:
        """Nothing is ever queued."""

    def graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """The function itself."""
        return run

    def seconds(self, run: Callable[[], object]) -> float:
        """By the host's clock."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def versions() -> dict[str, str]:
    """Of pyqlora and the peers."""
    import pyqlora

    found = {"pyqlora": pyqlora.__version__, "torch": torch.__version__}
    for name, there in (("bitsandbytes", HAVE_BITSANDBYTES), ("peft", HAVE_PEFT), ("transformers", HAVE_TRANSFORMERS)):
        found[name] = importlib.import_module(name).__version__ if there else "not installed"
    return found


@dataclass(frozen=True)
class Limits:
    """Bytes and bf16 floating-point operations per second, as measured."""

    bandwidth: float
    flops: float


def limits(gpu: Gpu) -> Limits:
    """The best of a few large copies, and of a few large matrix products."""
    x = torch.randint(256, (gpu.sizes(1 << 30, 1 << 16),), dtype=torch.uint8, device=gpu.device)
    y = torch.empty_like(x)
    n = gpu.sizes(8192, 32)
    a, b = (torch.randn(n, n, device=gpu.device, dtype=torch.bfloat16) for _ in range(2))
    copy = min(gpu.seconds(lambda: y.copy_(x)) for _ in range(5))
    product = min(gpu.seconds(lambda: a @ b) for _ in range(5))
    return Limits(2 * x.numel() / copy, 2 * n**3 / product)


def measure(gpu: Gpu, case: Case, known: Limits, rounds: int) -> dict:
    """Milliseconds of every implementation (median, lowest, highest), and the fraction of the limits ours reaches."""
    case.check()
    for run in case.runs.values():
        for _ in range(gpu.sizes(3, 1)):
            run()
    gpu.synchronize()
    samples = {name: [] for name in case.runs}
    for _ in range(rounds):
        for name, run in case.runs.items():
            samples[name].append(gpu.seconds(run) * 1e3)
    runs = {name: {"ms": statistics.median(t), "ms_min": min(t), "ms_max": max(t)} for name, t in samples.items()}
    seconds = runs["pyqlora"]["ms"] / 1e3
    fractions = {"bandwidth": case.bytes / seconds / known.bandwidth, "flops": case.flops / seconds / known.flops}
    return {"case": case.name, "runs": runs, "fractions": fractions}


COLUMNS = (
    "case",
    "pyqlora ms",
    "spread",
    "of bandwidth",
    "of FLOPs",
    "bnb + peft ms",
    "over them",
    "torch ms",
    "over it",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(result: dict) -> str:
    """A table line; a ratio above 1 where pyqlora is faster."""
    runs, fractions = result["runs"], result["fractions"]
    ours = runs["pyqlora"]
    cells = [result["case"], f"{ours['ms']:.3g}", f"{ours['ms_min']:.3g}–{ours['ms_max']:.3g}"]
    cells += [f"{fractions[limit]:.0%}" if fractions[limit] else "–" for limit in ("bandwidth", "flops")]
    for peer in ("peer", "torch"):
        cells += [f"{runs[peer]['ms']:.3g}", f"{runs[peer]['ms'] / ours['ms']:.2f}x"] if peer in runs else ["–", "–"]
    return "| " + " | ".join(cells) + " |"
