"""The products of lora_linear on the CPU: activations and factors in any float but float64, float32 sums and s.

The same calls as `pyqlora.ops.lora_linear_cuda`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora.ops.backend import native, on_gpu

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations and factors."""
    return all(t.dtype in _FLOATS and t.is_cpu and not on_gpu(t) for t in tensors)


def down(
    x: Tensor, a: list[Tensor], scales: list[float], seed: Tensor | None = None, dropout: float = 0.0
) -> list[Tensor]:
    """scale · drop(x)·Aᵀ, float32 [M, r], for each of the factors [r, K]; x is [..., K], M rows. The dropped x is not
    scaled."""
    module, context = native(x)
    k = x.size(-1)
    x, sums = x.contiguous(), [x.new_empty((x.numel() // k, len(factor)), dtype=torch.float32) for factor in a]
    for factor, scale, s in zip(a, scales, sums, strict=True):
        module.lora_down(x, [factor.contiguous()], k, [scale], None, seed, dropout, s, None, context)
    return sums


def up(
    s: Tensor, b: list[Tensor], y: Tensor, seed: Tensor | None = None, dropout: float = 0.0, accumulate: bool = True
) -> Tensor:
    """y [M, N], which is contiguous and written to, plus (or, not `accumulate`, =) drop(s·Bᵀ); one factor [N, r]."""
    module, context = native(y)
    module.lora_up(s, [factor.contiguous() for factor in b], y.shape[-1], None, seed, dropout, y, accumulate, context)
    return y


def backward(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale · dy·B, float32 [M, r], and dyᵀ·s [N, r] in B's dtype), for dy [..., N], M rows."""
    ds, db = torch.empty_like(s), torch.empty_like(b, memory_format=torch.contiguous_format)
    module, context = native(dy)
    module.lora_backward(dy, b.contiguous(), s, scale, None, 0.0, ds, db, False, None, None, dy.size(-1), context)
    return ds, db


def backward_a(x: Tensor, a: Tensor, ds: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """dsᵀ·drop(x) [r, K], like A, for x [..., K]."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    module, context = native(x)
    module.lora_backward(x, None, ds, 1.0, seed, dropout, None, da, True, None, None, x.size(-1), context)
    return da
