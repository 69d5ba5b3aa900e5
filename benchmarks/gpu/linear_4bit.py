"""linear_4bit over the projections of Llama-3 8B and 70B; "torch" is the product with the bf16 matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyqlora
import pyqlora.functional as ours
from benchmarks.gpu.machine import HAVE_BITSANDBYTES, Case, Gpu
from benchmarks.gpu.quantize import PACKED_TWICE

ROWS = [2**i for i in range(13)]  # 1 to 4096
SHAPES = {
    "8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "70B": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}


def cases(gpu: Gpu) -> Iterator[Case]:
    for model, shapes in gpu.sizes(SHAPES, {"tiny": [(48, 128)]}).items():
        for shape in shapes:
            yield from _cases(gpu, model, *shape)


def _cases(gpu: Gpu, model: str, n: int, k: int) -> Iterator[Case]:
    w = torch.randn(n, k, device=gpu.device, dtype=torch.bfloat16) / k**0.5
    packed, state = ours.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    dense = ours.dequantize_4bit(packed, state)
    if HAVE_BITSANDBYTES:
        import bitsandbytes as peer

        theirs, their_state = peer.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    for m in gpu.sizes(ROWS, [1, 16, 70]):
        x = torch.randn(m, k, device=gpu.device, dtype=torch.bfloat16)
        runs = {"pyqlora": lambda x=x: pyqlora.matmul_4bit(x, packed.t(), state)}
        if HAVE_BITSANDBYTES:
            runs["peer"] = lambda x=x: peer.matmul_4bit(x, theirs.t(), their_state)
        runs["torch"] = lambda x=x: torch.nn.functional.linear(x, dense)

        def near(runs=runs):
            expected = runs["torch"]().float()
            for name, run in runs.items():
                error = (run().float() - expected).abs().max() / expected.abs().max()
                assert error < 4e-2, (name, error)

        size = n * k * PACKED_TWICE + 2 * m * (n + k)
        yield Case(f"linear_4bit {model} {n}x{k} M={m}", runs, size, 2 * m * n * k, near)
