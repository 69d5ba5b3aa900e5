"""quantize and dequantize, NF4 in blocks of 64, beside bitsandbytes; "torch dense" is a plain clone of the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as peer
import torch

import pyqlora.functional as ours
from benchmarks.harness import Case
from pyqlora.ops.quantize import dequantize_4bit_into

SHAPES = [(4096, 4096), (1536, 576), (576, 576)]
WORKSPACE_BYTES = 1 << 19  # stays in the second-level cache: how a product takes W
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for label, dtype in DTYPES.items():
            yield from _cases(shape, label, dtype)


def _cases(shape: tuple[int, int], label: str, dtype: torch.dtype) -> Iterator[Case]:
    w = (torch.randn(shape) * 0.02).to(dtype)
    name = f"{shape[0]}x{shape[1]} {label}"
    packed, state = ours.quantize_4bit(w, quant_type="nf4")
    peer_packed, peer_state = peer.quantize_4bit(w, quant_type="nf4")

    def same_bytes():
        assert torch.equal(packed, peer_packed) and torch.equal(state.absmax, peer_state.absmax)

    for double in (False, True):
        yield Case(
            f"quantize {name}{', double' if double else ''}",
            {
                "pyqlora": lambda double=double: ours.quantize_4bit(w, quant_type="nf4", compress_statistics=double),
                "bitsandbytes": lambda double=double: peer.quantize_4bit(
                    w, quant_type="nf4", compress_statistics=double
                ),
                "torch dense": w.clone,
            },
            same_bytes,
        )

    out = torch.empty_like(w)
    arguments = (packed, state.absmax, None, None, None, 256, 64, "nf4", w.numel())

    piece = torch.empty(min(w.numel(), WORKSPACE_BYTES // w.itemsize), dtype=dtype)

    def in_pieces():
        for first in range(0, w.numel(), piece.numel()):
            dequantize_4bit_into(piece[: w.numel() - first], *arguments, first)

    def same_values():
        expected = peer.dequantize_4bit(peer_packed, peer_state)
        for first in range(0, w.numel(), piece.numel()):
            part = dequantize_4bit_into(piece[: w.numel() - first], *arguments, first)
            assert torch.equal(part, expected.view(-1)[first : first + part.numel()])
        assert torch.equal(ours.dequantize_4bit(packed, state), expected)
        assert torch.equal(dequantize_4bit_into(out, *arguments), expected)

    runs = {
        "dequantize": lambda: ours.dequantize_4bit(packed, state),
        "dequantize into a tensor kept by the caller": lambda: dequantize_4bit_into(out, *arguments),
        "dequantize in pieces into a reused 512 KiB workspace": in_pieces,
    }
    peer_runs = {"bitsandbytes": lambda: peer.dequantize_4bit(peer_packed, peer_state), "torch dense": w.clone}
    for what, run in runs.items():
        yield Case(f"{what} {name}", {"pyqlora": run, **peer_runs}, same_values)
    if w.numel() >= 1 << 24:
        kept: dict[str, list] = {"pyqlora": [], "bitsandbytes": []}  # results that live on: fresh memory every time

        def keep(who, run):
            kept[who].append(run())
            del kept[who][:-6]

        fresh = {"pyqlora": runs["dequantize"], "bitsandbytes": peer_runs["bitsandbytes"]}
        yield Case(
            f"dequantize, every result kept, {name}",
            {who: lambda who=who, run=run: keep(who, run) for who, run in fresh.items()},
            same_values,
        )
