"""linear_dense: y = x · Wᵀ + bias for few rows of x and a W that is not quantized, on a CPU.

    x [..., K] of up to 4 rows, W [N, K], bias [N], y [..., N], all of one dtype

What an output layer computes for each token that is generated: W is read once, and reading it is what takes the time.
torch has the processor fetch it ahead in one stream, which falls short of what the memory gives; here there are four.
Computed in float32 and rounded once. Not differentiable; on a GPU torch's own product is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyqlora.ops.backend import fast_on_cpu, native

MAX_ROWS = 4
_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_dense` takes these, nothing is to be differentiated, and it is faster than torch."""
    return (
        not torch.is_grad_enabled()
        and fast_on_cpu(x, weight)
        and x.dtype == weight.dtype
        and x.dtype in _FLOATS
        and _fits(x, weight)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(x: Tensor, weight: Tensor) -> bool:
    return weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] > 0 and _rows(x) <= MAX_ROWS


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias.

    Args:
        x: [..., K], up to 4 rows of float32, float16 or bfloat16.
        weight: [N, K], like x.
        bias: [N], like x, or None.

    Returns:
        [..., N], like x. A row's bits do not depend on the other rows, nor on the number of threads.

    Raises:
        ValueError: an argument has the wrong dtype, device or size; the message names it.
    """
    if not _fits(x, weight):
        raise ValueError(
            f"linear_dense: expected x [..., K] of up to {MAX_ROWS} rows and weight [N, K] with a K of at least 1, "
            f"got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    y = x.new_empty((*x.shape[:-1], len(weight)))
    module, threads = native(x)
    bias = None if bias is None else bias.contiguous()
    module.linear_dense(x.contiguous(), weight.contiguous(), bias, y, x.shape[-1], threads)
    return y
