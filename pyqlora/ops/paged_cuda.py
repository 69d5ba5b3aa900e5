"""paged on a GPU: optimizer states that come to it one group ahead of use, and leave it for the host when the driver
needs the room (unified memory), or after each use (pinned memory with copies).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pyqlora.ops.backend import native
from pyqlora.ops.paged import ALIGNMENT, Spec

GROUP_BYTES = 64 << 20  # of states that move together: one is on the GPU while the next one moves


def paged_by_gpu(param: Tensor) -> bool:
    """Whether the states of this parameter are paged by a GPU."""
    return param.device.type != "meta" and hasattr(native(param)[0], "PagedMemory")


class Pages:
    """Zero tensors, one per (shape, dtype), in one allocation that visits the GPU of `param`: see `in_turn`.

    Where the GPU shares memory with a running CPU (concurrentManagedAccess), `tensors` lie in unified memory and are
    CUDA tensors. Elsewhere they are CPU tensors in pinned memory, whose contents the host may read after `synchronize`.
    """

    def __init__(self, specs: Sequence[Spec], param: Tensor):
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
        offsets, total = [], 0
        for size in sizes:
            offsets.append(total)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self._param = param
        self.device = param.device
        self.bytes = max(total, ALIGNMENT)
        self.memory = native(param)[0].PagedMemory(self.bytes, param.device.index or 0)
        if not self.memory.managed:
            _warn_of_copies(param.device)
        if self.memory.managed and param.is_cuda:
            base = torch.as_tensor(self.memory, device=param.device)
        else:
            base = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.tensors = [
            base[offset : offset + size].view(dtype).view(tuple(shape))
            for (shape, dtype), offset, size in zip(specs, offsets, sizes, strict=True)
        ]
        self._slot: Tensor | None = None

    def fetch(self, slot: Tensor | None) -> None:
        """Start to move the states to the GPU, after what the current stream was given; pinned ones into the slot."""
        self._slot = slot
        self.memory.fetch(slot, native(self._param)[1])

    def finish(self) -> None:
        """What the current stream was given is done with the states: pinned ones are copied back, and those in unified
        memory stay until the driver needs the room.
        """
        self.memory.finish(self._slot, native(self._param)[1])
        self._slot = None

    def join(self) -> None:
        """What the current stream is given from now on comes after the last move."""
        self.memory.join(native(self._param)[1])

    def on_device(self, tensor: Tensor) -> Tensor:
        """One of `tensors` as kernels see it between `fetch` and `finish`."""
        if self.memory.managed:
            return tensor
        offset = tensor.data_ptr() - self.memory.pointer
        return self._slot[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def synchronize(self) -> None:
        """Wait for the last move."""
        self.memory.synchronize()


def get_paged(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that this GPU and the host address alike: a CPU tensor, as bitsandbytes has it."""
    size = math.prod(shape) * dtype.itemsize
    memory = native(torch.empty(0, device=device))[0].PagedMemory(max(size, 1), device.index or 0)
    if not memory.managed:
        _warn_of_copies(device)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(tuple(shape))


def in_turn(groups: Iterable[Pages]) -> Iterator[Pages]:
    """Each of the groups while its states are on the GPU and those of the next one are on their way.

    The moves run beside the kernels, on a stream of their own that begins and ends in the current stream.
    """
    by_device: dict[torch.device, list[Pages]] = {}
    for pages in groups:
        by_device.setdefault(pages.device, []).append(pages)
    for device, queue in by_device.items():
        slots: list[Tensor | None] = [None, None]
        if not all(pages.memory.managed for pages in queue):
            size = max(pages.bytes for pages in queue)
            slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in queue[:2]]
        try:
            queue[0].fetch(slots[0])
            for k, pages in enumerate(queue):
                if k + 1 < len(queue):
                    queue[k + 1].fetch(slots[(k + 1) % 2])
                pages.join()
                yield pages
                pages.finish()
        finally:  # and only then are the slots free
            for pages in queue:
                pages.join()


@lru_cache
def _warn_of_copies(device: torch.device) -> None:
    warnings.warn(
        f"{device} cannot share memory with a running CPU (concurrentManagedAccess is 0): paged optimizer states are "
        "kept in pinned memory and copied to the GPU and back",
        stacklevel=4,
    )
