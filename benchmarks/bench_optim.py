"""A step of AdamW beside bitsandbytes; "torch dense" is torch's fused AdamW with float32 states.

The tensors are the LoRA matrices of SmolLM2-135M at r=16 on all seven projections (420 tensors, 4.88 M parameters),
and one tensor of 100 M parameters: there a step moves 28 bytes a parameter in 32 bits, 16 in 8 bits. "In place add"
and "sum" are what the memory gives: 8 bytes a parameter read and written, 4 bytes read. "Paged out" writes the states
to the disk and drops them from memory before every step, outside the measured time: its wall time is what paging
costs at worst.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import bitsandbytes.optim as peer
import torch

import pyqlora.optim as ours
from benchmarks.harness import Case

RANK, LAYERS, HIDDEN, INTERMEDIATE, KV = 16, 30, 576, 1536, 192
PROJECTIONS = [
    (HIDDEN, HIDDEN),
    (KV, HIDDEN),
    (KV, HIDDEN),
    (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
]
LORA = [shape for n, k in PROJECTIONS * LAYERS for shape in ((RANK, k), (n, RANK))]
LARGE = [(100_000_000,)]
MS_SYNC, MADV_PAGEOUT = 4, 21  # of Linux
NAMES = ("AdamW8bit", "PagedAdamW8bit", "AdamW32bit", "PagedAdamW32bit")


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return ps


def cases() -> Iterator[Case]:
    for name in NAMES:
        sets = {impl: parameters(LORA) for impl in ("pyqlora", "bitsandbytes", "torch dense")}
        yield _case(f"{name}, 420 LoRA tensors", name, sets)
    for name in ("AdamW8bit", "AdamW32bit"):
        shared = parameters(LARGE)
        yield _case(f"{name}, 100M parameters", name, {"pyqlora": shared, "torch dense": shared})

    large = shared[0].data
    yield Case("in place add, 100M parameters", {"pyqlora": lambda: large.add_(1e-9)}, lambda: None)
    yield Case("sum, 100M parameters", {"pyqlora": large.sum}, lambda: None)
    ps = parameters([(10_000_000,)])
    optimizer = ours.PagedAdamW8bit(ps)
    optimizer.step()
    yield Case("PagedAdamW8bit, 10M parameters, in memory", {"pyqlora": optimizer.step}, lambda: None)
    yield Case(
        "PagedAdamW8bit, 10M parameters, paged out",
        {"pyqlora": optimizer.step},
        lambda: None,
        before=lambda: page_out(optimizer.state[ps[0]]),
    )


def page_out(state: dict) -> None:
    """The pages of an optimizer's state leave memory for the file behind them."""
    libc = ctypes.CDLL(None, use_errno=True)
    for key in ("state1", "state2"):
        first = state[key].data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        last = state[key].data_ptr() + state[key].nbytes
        libc.msync(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MS_SYNC)
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT):
            raise OSError(ctypes.get_errno(), "madvise(MADV_PAGEOUT)")


def _case(label: str, name: str, sets: dict[str, list[torch.nn.Parameter]]) -> Case:
    makers = {
        "pyqlora": lambda ps: getattr(ours, name)(ps),
        "bitsandbytes": lambda ps: getattr(peer, name)(ps),
        "torch dense": lambda ps: torch.optim.AdamW(ps, fused=True),
    }
    runs = {impl: makers[impl](ps).step for impl, ps in sets.items()}

    def same_parameters():
        for run in runs.values():
            run()
        reference = sets["torch dense"]
        for ps in sets.values():
            # One step of lr 1e-3; 8-bit states first matter in the second.
            for p, q in zip(ps, reference, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    return Case(label, runs, same_parameters)
