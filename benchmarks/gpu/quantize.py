"""quantize and dequantize to NF4 in blocks of 64; "torch" is a copy of the bf16 matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyqlora.functional as ours
from benchmarks.gpu.machine import HAVE_BITSANDBYTES, Case, Gpu

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
PACKED = 0.5 + 4 / 64  # bytes a weight
PACKED_TWICE = 0.5 + (1 + 4 / 256) / 64


def cases(gpu: Gpu) -> Iterator[Case]:
    for shape in gpu.sizes(SHAPES, [(32, 64)]):
        w = torch.randn(shape, device=gpu.device, dtype=torch.bfloat16)
        for double in (False, True):
            yield from _cases(f"{shape[0]}x{shape[1]} bf16{', double' if double else ''}", w, double)


def _cases(name: str, w: torch.Tensor, double: bool) -> Iterator[Case]:
    packed, state = ours.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
    size = PACKED_TWICE if double else PACKED
    quantize = {"pyqlora": lambda: ours.quantize_4bit(w, quant_type="nf4", compress_statistics=double)}
    dequantize = {"pyqlora": lambda: ours.dequantize_4bit(packed, state)}

    def near():
        error = (ours.dequantize_4bit(packed, state) - w).float().square().mean().sqrt()
        assert error < 0.2, error

    if HAVE_BITSANDBYTES:
        import bitsandbytes.functional as peer

        peer_packed, peer_state = peer.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        quantize["peer"] = lambda: peer.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        dequantize["peer"] = lambda: peer.dequantize_4bit(peer_packed, peer_state)
    quantize["torch"] = dequantize["torch"] = w.clone
    yield Case(f"quantize {name}", quantize, w.numel() * (2 + size), check=near)
    yield Case(f"dequantize {name}", dequantize, w.numel() * (2 + size), check=near)
