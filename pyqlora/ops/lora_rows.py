"""lora_rows: every sample of a batch with its own low-rank update, of its own rank, or with none."""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora.ops import lora_linear_cuda as kernels
from pyqlora.ops.backend import is_plain
from pyqlora.ops.lora_linear import update_dtype

library = torch.library.Library("pyqlora", "FRAGMENT")
library.define("lora_rows(Tensor base, Tensor x, Tensor[] a, Tensor[] b, float[] scalings, int[] adapters) -> Tensor")


@torch.library.register_fake("pyqlora::lora_rows", lib=library)
def _(base, x, a, b, scalings, adapters):
    return base.new_empty(base.shape)


def _forward(base: Tensor, x: Tensor, a: list, b: list, scalings: list[float], adapters: list[int]) -> Tensor:
    if kernels.serves(x, base):
        return _by_tiles(base, x, a, b, scalings, adapters)
    return _by_batched_products(base, x, a, b, scalings, adapters).contiguous()


def _by_tiles(base, x, a, b, scalings, adapters):
    """Two launches, for each 64 adapters, however many rows and ranks there are."""
    y = base.clone(memory_format=torch.contiguous_format)
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for first in range(0, len(a), kernels.MAX_ADAPTERS):
        these = slice(first, first + kernels.MAX_ADAPTERS)
        there = range(first, first + len(a[these]))
        local = tuple(adapter - first if adapter in there else -1 for adapter in adapters)
        tiles = kernels.tiles_of(local, len(rows) // len(adapters), x.device)
        s = kernels.down_rows(rows, a[these], scalings[these], tiles)
        kernels.up(s, b[these], out, tiles=tiles)
    return y


def _by_batched_products(base, x, a, b, scalings, adapters):
    """With torch alone, and differentiable: factors padded to one rank are gathered for each sample."""
    dtype, rank = update_dtype(x, a[0]), max(map(len, a))
    left = x.new_zeros((len(a) + 1, rank, x.shape[-1]), dtype=dtype)  # the last stays zero: samples without an update
    right = x.new_zeros((len(a) + 1, base.shape[-1], rank), dtype=dtype)
    for i, (down, up, scaling) in enumerate(zip(a, b, scalings, strict=True)):
        left[i, : len(down)] = down
        right[i, :, : len(down)] = up * scaling
    chosen = torch.tensor([len(a) if i < 0 else i for i in adapters], device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        h = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(dtype), left[chosen].mT)
        rows = base.reshape(len(x), -1, base.shape[-1]).to(dtype)
        return torch.baddbmm(rows, h, right[chosen].mT).to(base.dtype).view(base.shape)


for _key in ("CPU", "CUDA"):
    library.impl("lora_rows", _forward, _key)


def lora_rows(
    base: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scalings: list[float], adapters: list[int]
) -> Tensor:
    """base + scaling · (x·Aᵀ)·Bᵀ, with the factors of its own adapter for every sample.

    Args:
        base: [samples, ..., N].
        x: [samples, ..., K].
        a: A of each adapter, [r, K]; ranks may differ.
        b: B of each adapter, [N, r].
        scalings: one for each adapter.
        adapters: which of them each sample has, or -1 for none.

    Returns:
        [samples, ..., N] in the dtype of `base`.

    Raises:
        ValueError: lists of different lengths, an adapter that is not there, or shapes that do not fit together.
    """
    _check(base, x, a, b, scalings, adapters)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (base, x, *a, *b)):
        return _by_batched_products(base, x, a, b, scalings, adapters)
    forward = _forward if is_plain(x) else torch.ops.pyqlora.lora_rows
    return forward(base, x, a, b, scalings, adapters)


def _check(base, x, a, b, scalings, adapters) -> None:
    if not len(a) == len(b) == len(scalings) > 0:
        counts = f"{len(a)}, {len(b)} and {len(scalings)}"
        raise ValueError(f"lora_rows: expected as many a as b and scalings, at least one, got {counts}")
    if len(adapters) != len(x) or not all(-1 <= i < len(a) for i in adapters):
        raise ValueError(
            f"lora_rows: adapters: expected {len(x)} numbers from -1 to {len(a) - 1}, got {list(adapters)}"
        )
    for down, up in zip(a, b, strict=True):
        shapes = (len(down), x.shape[-1]), (base.shape[-1], len(down))
        if (down.shape, up.shape) != shapes or base.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"lora_rows: expected base [..., N], x [..., K], a [r, K], b [N, r], got base {list(base.shape)}, "
                f"x {list(x.shape)}, a {list(down.shape)}, b {list(up.shape)}"
            )
