"""linear_4bit on a GPU: which of three ways serves a shape, and the calls.

simt
    any dtype and shape, each weight decoded once per 8 rows of x.
mma
    tensor cores: 16-bit x of at most 64 rows, K in multiples of 64, blocks of 64 and more.
dequantize
    W decoded into memory in one launch, then torch.matmul.

The environment variable PYQLORA_LINEAR_4BIT names one of them for all shapes that it can serve, or sets thresholds of
the table below, as "mma_rows=48 simt_rows=2": `python -m benchmarks dispatch` measures them on the GPU at hand.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyqlora.ops.backend import native
from pyqlora.ops.quantize import dequantize_4bit_into


@dataclass(frozen=True)
class Thresholds:
    """Up to how many rows of x a kernel beats decoding W for a library GEMM, which on the large GPUs has faster
    instructions to itself."""

    mma_rows: int  # the tensor-core kernel
    small_mma_rows: int = 4  # the same where W has fewer than `small` weights
    small: int = 1 << 20
    simt_rows: int = 4  # the simt kernel, where mma cannot serve


# By compute capability; the next smaller entry serves one that is not here. 90 was measured on an H200, the others are
# from the measurements in bitsandbytes' dispatcher.
TABLE = {
    75: Thresholds(mma_rows=32),
    80: Thresholds(mma_rows=64),
    90: Thresholds(mma_rows=64, small_mma_rows=32),
    100: Thresholds(mma_rows=16),
    120: Thresholds(mma_rows=64),
}
WAYS = ("simt", "mma", "dequantize")


def forward(
    x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None, update: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x [..., K] · Wᵀ + bias; `weight` is (packed, absmax, nested_*, offset, nested_blocksize, blocksize, type).

    `update` is (s [M, r] in x's dtype, B [N, r]): s·Bᵀ is added, inside the kernel or onto its result.
    """
    x, (n, k) = x.contiguous(), shape
    aligned = (x.data_ptr() | weight[0].data_ptr()) % 16 == 0
    way = choose(x.numel() // k, n, k, weight[6], x.dtype, aligned, gpu_of(x.device)[0])
    if update is not None and way == "mma":
        return mma(x, weight, shape, bias, update)
    y = {"simt": simt, "mma": mma, "dequantize": dequantize}[way](x, weight, shape, bias)
    if update is not None:
        y.view(-1, n).addmm_(update[0], update[1].to(y.dtype).t())
    return y


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, blocksize: int, dtype: torch.dtype, aligned: bool, capability: int) -> str:
    """Which way serves m rows of x and a W of [n, k] on a GPU of this compute capability (80 for 8.0)."""
    can_mma = 1 <= m <= 64 and k % 64 == 0 and k <= 1 << 24 and blocksize >= 64 and aligned
    can_mma = can_mma and dtype in (torch.float16, torch.bfloat16)
    can_mma = can_mma and capability >= (80 if dtype == torch.bfloat16 else 75)
    way, limits = _override(TABLE[max((c for c in TABLE if c <= capability), default=min(TABLE))])
    if way is not None and (way != "mma" or can_mma):
        return way
    if can_mma and m <= (limits.mma_rows if n * k >= limits.small else limits.small_mma_rows):
        return "mma"
    return "simt" if m <= limits.simt_rows else "dequantize"


def _override(limits: Thresholds) -> tuple[str | None, Thresholds]:
    """The way that PYQLORA_LINEAR_4BIT forces, if any, and the thresholds after what it sets."""
    text = os.environ.get("PYQLORA_LINEAR_4BIT")
    if text is None or text in WAYS:
        return text, limits
    try:
        return None, replace(limits, **{name: int(value) for name, value in (p.split("=") for p in text.split())})
    except (TypeError, ValueError):
        ways = f"{', '.join(WAYS[:-1])} or {WAYS[-1]}"
        expected = f"{ways}, or thresholds as in 'mma_rows=48 simt_rows=2'"
        raise ValueError(f"PYQLORA_LINEAR_4BIT: expected {expected}, got {text!r}") from None


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors; for the CPU tensors of an emulated GPU, those of a small one."""
    if device.type == "cpu":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def simt(x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None) -> Tensor:
    """The kernel for any dtype and shape."""
    *packed_and_scales, blocksize, quant_type = weight
    y = x.new_empty((*x.shape[:-1], shape[0]))
    module, context = native(x)
    module.linear_4bit(x, *packed_and_scales, bias, y, *shape, blocksize, quant_type, context)
    return y


def mma(
    x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None, update: tuple[Tensor, Tensor] = (None, None)
) -> Tensor:
    """The tensor-core kernel; the sum over K is split where W has too few rows to give every multiprocessor work.

    `update` is (s [M, r] in x's dtype, B [N, r]): s·Bᵀ is added.
    """
    *packed_and_scales, blocksize, quant_type = weight
    y = x.new_empty((*x.shape[:-1], shape[0]))
    module, context = native(x)
    splits = module.linear_4bit_mma_splits(math.prod(x.shape[:-1]), *shape, gpu_of(x.device)[1])
    workspace = x.new_empty((splits, y.numel()), dtype=torch.float32) if splits > 1 else None
    module.linear_4bit_mma(x, *packed_and_scales, bias, y, *shape, blocksize, quant_type, workspace, *update, context)
    return y


def dequantize(x: Tensor, weight: tuple, shape: list[int], bias: Tensor | None) -> Tensor:
    """W in x's dtype, then torch's GEMM."""
    return torch.nn.functional.linear(x, whole(weight, shape, x), None if bias is None else bias.to(x.dtype))


def whole(weight: tuple, shape: list[int], x: Tensor) -> Tensor:
    """W [N, K] decoded to x's dtype in one launch, into memory that torch's allocator hands out again on the same
    stream."""
    n, k = shape
    return dequantize_4bit_into(x.new_empty(n, k), *weight, n * k)
