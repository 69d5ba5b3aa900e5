"""An optimizer's step over the LoRA tensors of Llama-3-8B at rank 16 (448 tensors, 41.9 M parameters); "torch" is its
fused AdamW with float32 states.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyqlora.optim as ours
from benchmarks.gpu.machine import HAVE_BITSANDBYTES, Case, Gpu

RANK, LAYERS = 16, 32
PROJECTIONS = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
NAMES = {  # bytes a parameter in memory traffic: bf16 parameter and gradient, states read and written
    "AdamW8bit": 10.06,
    "PagedAdamW8bit": 10.06,
    "AdamW32bit": 22,
    "PagedAdamW32bit": 22,
    "Lion8bit": 8.03,
}


def parameters(gpu: Gpu) -> list[torch.nn.Parameter]:
    """The adapters' tensors with gradients."""
    shapes = [shape for n, k in PROJECTIONS * LAYERS for shape in ((RANK, k), (n, RANK))]
    result = []
    for shape in gpu.sizes(shapes, [(16, 300), (5, 16)]):
        p = torch.nn.Parameter(torch.randn(shape, device=gpu.device).to(torch.bfloat16))
        p.grad = torch.randn_like(p) * 1e-3
        result.append(p)
    return result


def cases(gpu: Gpu) -> Iterator[Case]:
    for name, size in NAMES.items():
        sets = {"pyqlora": parameters(gpu)}
        makers = {"pyqlora": getattr(ours, name)}
        if HAVE_BITSANDBYTES:
            import bitsandbytes.optim as peer

            sets["peer"], makers["peer"] = parameters(gpu), getattr(peer, name)
        if "Adam" in name:
            sets["torch"] = parameters(gpu)
            makers["torch"] = lambda params: torch.optim.AdamW(params, fused=True)
        runs = {who: makers[who](params).step for who, params in sets.items()}
        count = sum(p.numel() for p in sets["pyqlora"])
        yield Case(f"{name}, {count / 1e6:.1f} M parameters in {len(sets['pyqlora'])} tensors", runs, count * size)
