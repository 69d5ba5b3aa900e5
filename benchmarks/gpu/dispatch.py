"""Which way linear_4bit should take on this GPU: measures each for rising numbers of rows and fits the thresholds of
pyqlora/ops/linear_4bit_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.machine import Gpu
from pyqlora.ops import linear_4bit_cuda as kernels
from pyqlora.ops.quantize import quantize_4bit

LARGE = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)]
SMALL = [(256, 1024), (512, 1536), (1024, 512)]
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64]

Times = dict[int, dict[str, float]]  # rows of x -> way -> seconds, summed over shapes


def last_win(times: Times, way: str) -> int:
    """Up to how many rows the way is never slower than decoding W; 0 if it is for the fewest."""
    best = 0
    for rows in sorted(times):
        if times[rows].get(way, float("inf")) > times[rows]["dequantize"]:
            break
        best = rows
    return best


def fit(large: Times, small: Times) -> kernels.Thresholds:
    """The thresholds that these times ask for."""
    return kernels.Thresholds(
        mma_rows=last_win(large, "mma"), small_mma_rows=last_win(small, "mma"), simt_rows=last_win(large, "simt")
    )


def measured(gpu: Gpu, shapes: list[tuple[int, int]], rounds: int, seconds: Callable[[Callable], float]) -> Times:
    """Each way's times on these shapes of W, in bf16 with blocks of 64; `seconds` is the clock."""
    times: Times = {rows: dict.fromkeys(kernels.WAYS, 0.0) for rows in gpu.sizes(ROWS, [1, 4, 64])}
    for n, k in shapes:
        packed, absmax = quantize_4bit(torch.randn(n, k, device=gpu.device), 64, "nf4")
        weight = (packed, absmax, None, None, None, 256, 64, "nf4"), [n, k], None
        for rows, by_way in times.items():
            x = torch.randn(rows, k, device=gpu.device, dtype=torch.bfloat16)
            for way in by_way:
                run = getattr(kernels, way)
                samples = [seconds(lambda run=run, args=(x, *weight): run(*args)) for _ in range(rounds + 1)]
                by_way[way] += sorted(samples[1:])[rounds // 2]
    return times


def refit(gpu: Gpu, rounds: int, seconds: Callable[[Callable], float] | None = None) -> kernels.Thresholds:
    """Measure, print the times in microseconds, and say what to set."""
    clock = seconds or gpu.seconds
    large = measured(gpu, gpu.sizes(LARGE, [(64, 256)]), rounds, clock)
    small = measured(gpu, gpu.sizes(SMALL, [(16, 128)]), rounds, clock)
    print("| rows | " + " | ".join(f"{way}, {size}" for size in ("large W", "small W") for way in kernels.WAYS) + " |")
    print("|---" * (1 + 2 * len(kernels.WAYS)) + "|")
    for rows in large:
        cells = [f"{times[rows][way] * 1e6:.1f}" for times in (large, small) for way in kernels.WAYS]
        print(f"| {rows} | " + " | ".join(cells) + " |")
    fitted = fit(large, small)
    values = " ".join(f"{name}={getattr(fitted, name)}" for name in ("mma_rows", "small_mma_rows", "simt_rows"))
    print(f"\nexport PYQLORA_LINEAR_4BIT='{values}'")
    return fitted
