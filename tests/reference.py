"""The formats in a few lines of plain torch: what every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 += [-v for v in FP4]
TABLES = {"nf4": NF4, "fp4": FP4}
TINY = 1e-38  # the smallest divisor


def table(quant_type: str) -> Tensor:
    """Code -> value, float32 [16]."""
    return torch.tensor(TABLES[quant_type], dtype=torch.float32) + 0.0  # no negative zero


def _blocks(x: Tensor, blocksize: int) -> list[Tensor]:
    return list(x.flatten().float().split(blocksize))


# Midpoints as bitsandbytes' CUDA code has them; those of FP4 divide magnitudes.
GPU_BOUNDS = {
    "nf4": [
        -0.84809643, -0.6106329, -0.45999527, -0.33967942, -0.2346074,
        -0.13791174, -0.045525018, 0.03979015, 0.120255254, 0.20352125,
        0.29201376, 0.38931254, 0.5016634, 0.6427869, 0.8614784,
    ],
    "fp4": [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333],
}  # fmt: skip


def _codes(scaled: Tensor, quant_type: str, on_gpu: bool) -> Tensor:
    values, codes = table(quant_type).sort(stable=True)
    bounds = torch.tensor(GPU_BOUNDS[quant_type]) if on_gpu else (values[1:] + values[:-1]) / 2
    if on_gpu and quant_type == "fp4":
        magnitudes = table("fp4")[:8].argsort()
        return magnitudes[torch.bucketize(scaled.abs(), bounds)] + 8 * (scaled < 0)
    return codes[torch.bucketize(scaled, bounds)]  # how many bounds are below; NaN is above all


def quantize_4bit(x: Tensor, blocksize: int, quant_type: str, on_gpu: bool = False) -> tuple[Tensor, Tensor]:
    """(packed uint8 [(n+1)//2, 1], absmax float32 [blocks]) of a tensor that is not empty, as bitsandbytes has it on
    either device: the code of its CPU backend divides a last block that is not full.
    """
    absmax, scaled = [], []
    for block in _blocks(x, blocksize):
        largest = block.abs().max()
        divisor = largest.clamp(min=TINY)
        full = len(block) == blocksize
        absmax.append(largest if full or on_gpu else divisor)
        scaled.append(block * (1.0 / divisor) if full or on_gpu else block / divisor)
    flat = torch.cat(scaled)
    flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
    code = _codes(flat, quant_type, on_gpu).to(torch.uint8)
    packed = code[0::2] << 4 | code[1::2]
    return packed.unsqueeze(1), torch.stack(absmax)


def scales(absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: Tensor, nested_blocksize: int) -> Tensor:
    """The float32 absmax behind double quantization."""
    return dequantize_blockwise(absmax, nested_code, nested_absmax, nested_blocksize, torch.float32) + offset


def dequantize_4bit(packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape, dtype) -> Tensor:
    """Value times absmax in float32, rounded once to dtype."""
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    n = torch.Size(shape).numel()
    values = table(quant_type)[codes[:n]] * absmax.repeat_interleave(blocksize)[:n]
    return values.to(dtype).reshape(shape)


def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int, on_gpu: bool = False) -> tuple[Tensor, Tensor]:
    """(codes uint8 like x, absmax float32 [blocks]): the nearest value, as bitsandbytes has it on either device: on a
    CPU after rounding to 65536 points of [-1, 1], on a GPU, halfway between two, that of even index.
    """
    midpoints = (code[1:] + code[:-1]) * 0.5
    q, absmax = [], []
    for block in _blocks(x, blocksize):
        largest = block[~block.isnan()].abs().amax() if not block.isnan().all() else torch.tensor(0.0)
        scaled = (block * (1.0 / largest)).nan_to_num(nan=-1.0).clamp(-1, 1)
        if on_gpu:
            rank, last = torch.bucketize(scaled, midpoints), torch.bucketize(scaled, midpoints, right=True)
            rank += (rank % 2) * (last > rank)
        else:
            point = (((scaled + 1.0) * 0.5).double() * 65535.0 + 0.5).float().int()
            rank = torch.bucketize((2 * point).float() / 65535.0 - 1.0, midpoints)
        q.append(torch.where(largest > 0, rank, 0).to(torch.uint8))
        absmax.append(largest)
    return torch.cat(q).reshape(x.shape), torch.stack(absmax)


def dequantize_blockwise(q: Tensor, code: Tensor, absmax: Tensor, blocksize: int, dtype) -> Tensor:
    """code[q] times absmax in float32, rounded once to dtype."""
    values = code[q.flatten().long()] * absmax.repeat_interleave(blocksize)[: q.numel()]
    return values.to(dtype).reshape(q.shape)
