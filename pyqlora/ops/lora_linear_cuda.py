"""The products of lora_linear on a GPU: 16-bit activations as they are, factors in any dtype, float32 sums.

Every sum is taken in a fixed order, in parts that meet in workspaces from torch's allocator.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyqlora.ops import backend
from pyqlora.ops.backend import native
from pyqlora.ops.linear_4bit_cuda import gpu_of

TILE_ROWS = 32  # at most, of one adapter
MAX_ADAPTERS = 64  # in one launch


_CAPABILITY = {torch.bfloat16: 80, torch.float16: 75}  # from which on tensor cores multiply it


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations: one 16-bit dtype that the GPU has tensor cores for."""
    dtype = tensors[0].dtype
    least = _CAPABILITY.get(dtype)
    if least is None:
        return False
    for tensor in tensors:
        if tensor.dtype != dtype or not backend.on_gpu(tensor):
            return False
    return gpu_of(tensors[0].device)[0] >= least


def down(
    x: Tensor, a: list[Tensor], scales: list[float], seed: Tensor | None = None, dropout: float = 0.0
) -> list[Tensor]:
    """scale · drop(x)·Aᵀ [M, r] for each of the factors [r, K], from one pass over x [..., K], M rows.

    A factor gives the same bits alone and with others. The dropped x is not scaled.
    """
    m, ranks = x.numel() // x.size(-1), [factor.size(0) for factor in a]
    count = -(-m // TILE_ROWS)
    if len(ranks) == 1:
        return [_down(x, a, scales, None, seed, dropout, x.new_empty(m, ranks[0]), count)]
    s = _down(x, a, scales, None, seed, dropout, x.new_empty(m * sum(ranks)), count)
    return [part.view(m, rank) for part, rank in zip(s.split([m * rank for rank in ranks]), ranks, strict=True)]


def down_rows(x: Tensor, a: list[Tensor], scales: list[float], tiles: Tensor) -> Tensor:
    """scale · x·Aᵀ [M, widest rank] of x [M, K]: every row by the factor [r, K] of its tile (see `tiles_of`), and zeros
    behind its columns."""
    s = x.new_empty((x.numel() // x.shape[-1], max(map(len, a))))
    return _down(x, a, scales, tiles, None, 0.0, s, len(tiles))


def _down(x, a, scales, tiles, seed, dropout, s, count) -> Tensor:
    module, context = native(x)
    k = x.size(-1)
    splits = module.lora_down_splits(count, k, gpu_of(x.device)[1])
    workspace = x.new_empty((splits, s.numel()), dtype=torch.float32) if splits > 1 and s.numel() else None
    a = [factor.contiguous() for factor in a]
    module.lora_down(x.contiguous(), a, k, scales, tiles, seed, dropout, s, workspace, context)
    return s


def up(
    s: Tensor,
    b: list[Tensor],
    y: Tensor,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    accumulate: bool = True,
    tiles: Tensor | None = None,
) -> Tensor:
    """y [M, N], which is contiguous and written to, plus (or, not `accumulate`, =) drop(s·Bᵀ); factors [N, r]."""
    module, context = native(y)
    b = [factor.contiguous() for factor in b]
    module.lora_up(s, b, y.size(-1), tiles, seed, dropout, y, accumulate, context)
    return y


def backward(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale · dy·B [M, r] in dy's dtype, dyᵀ·s [N, r] in B's), from one pass over dy [..., N], M rows."""
    ds, db = torch.empty_like(s), torch.empty_like(b, memory_format=torch.contiguous_format)
    blocks = native(dy)[0].lora_backward_column_blocks(dy.size(-1))
    ds_parts = s.new_empty((blocks, s.numel()), dtype=torch.float32)
    _backward(dy, b.contiguous(), s, scale, None, 0.0, ds, db, False, ds_parts)
    return ds, db


def backward_a(x: Tensor, a: Tensor, ds: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """dsᵀ·drop(x) [r, K], like A, for x [..., K]."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    _backward(x, None, ds, 1.0, seed, dropout, None, da, True, None)
    return da


def _backward(dy, b, s, scale, seed, dropout, ds, db, transposed, ds_parts) -> None:
    module, context = native(dy)
    n = dy.size(-1)
    m = dy.numel() // n
    chunks = module.lora_backward_chunks(m, n, gpu_of(dy.device)[1])
    parts = dy.new_empty((chunks, db.numel()), dtype=torch.float32)
    module.lora_backward(dy, b, s, scale, seed, dropout, ds, db, transposed, ds_parts, parts, n, context)


@functools.lru_cache(maxsize=256)
def tiles_of(adapters: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """The tiles of a batch whose i-th sample has `rows` rows of adapter adapters[i], or -1 for none."""
    tiles, sample = [], 0
    while sample < len(adapters):
        end = sample
        while end < len(adapters) and adapters[end] == adapters[sample]:
            end += 1
        for first in range(sample * rows, end * rows, TILE_ROWS):
            tiles.append((first, min(TILE_ROWS, end * rows - first), adapters[sample]))
        sample = end
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 3)
