"""Memory for the results of kernels: `empty_output`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyqlora import _C

LARGE_BYTES = 1 << 18


def empty_output(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor on the device of `like`; a large one on a CPU lies outside of the heap.

    Training keeps some results and frees others. glibc loses the gaps that these leave in its heap: an aligned block
    needs a larger one than a block of its size leaves, and small objects settle at its ends, so that it does not grow.
    `OutputMemory` is reused whole, and costs few page faults where it is new.
    """
    own = like.dtype
    dtype = dtype or own
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES or not like.is_cpu:
        # Sizes one by one are read in half the time that a list of them takes.
        return like.new_empty(*shape) if dtype is own and shape else like.new_empty(shape, dtype=dtype)
    if (output := _C.cpu.output_tensor(tuple(shape), dtype)) is not None:
        return output
    storage = torch.frombuffer(_C.cpu.OutputMemory(size), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # not a view, which would refuse to be written to
