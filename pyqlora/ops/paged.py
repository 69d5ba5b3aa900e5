"""paged: tensors in a file-backed mapping, so that under memory pressure they leave RAM for a disk."""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pyqlora.ops.backend import native

ALIGNMENT = 64
Spec = tuple[Sequence[int], torch.dtype]


def page_directory(directory: str | os.PathLike | None = None) -> Path:
    """Where the pages go: `directory`, else $PYQLORA_PAGE_DIR, else the directory for temporary files.

    Raises:
        ValueError: it is not a directory that can be written to.
    """
    path = Path(directory or os.environ.get("PYQLORA_PAGE_DIR") or tempfile.gettempdir())
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(
            f"page directory: expected an existing, writable directory, got {str(path)!r}: "
            "name one with page_dir=... or PYQLORA_PAGE_DIR"
        )
    return path


def paged_zeros(specs: Sequence[Spec], directory: str | os.PathLike | None = None) -> list[Tensor]:
    """CPU tensors of zeros, one per (shape, dtype), in one mapping of a nameless file in `directory`.

    The disk space is taken before this returns. The file has no name from the start, so whatever ends the process
    gives it back; before that, the last of the tensors does.

    Raises:
        ValueError: `directory` is not one.
        OSError: the disk has too little space left.
    """
    path = page_directory(directory)
    _warn_if_ram(path)
    offsets, total = [], 0
    for shape, dtype in specs:
        offsets.append(total)
        total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    if total == 0:
        return [torch.zeros(tuple(shape), dtype=dtype) for shape, dtype in specs]
    with tempfile.TemporaryFile(dir=path, prefix="pyqlora-pages-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
            raise OSError(
                error.errno,
                f"paged states need {total / 1e6:.1f} MB in {path}, which has {free / 1e6:.1f} MB free: "
                "name another directory with page_dir=... or PYQLORA_PAGE_DIR",
            ) from None
        pages = mmap.mmap(file.fileno(), total)
    # A storage each, so that torch.save takes them one by one; every one of them keeps the mapping alive.
    return [
        torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=offset).view(tuple(shape))
        if math.prod(shape)
        else torch.zeros(tuple(shape), dtype=dtype)
        for (shape, dtype), offset in zip(specs, offsets, strict=True)
    ]


def prefetch(tensor: Tensor, to_cpu: bool, device: torch.device) -> None:
    """Ask for the pages of a paged tensor before they are used, or to be rid of them; `device`: where they are used.

    On the current stream of a GPU unified memory migrates to it, or to the host with `to_cpu`. On a CPU the operating
    system is asked to read the pages ahead, or with `to_cpu` to write them to their file.

    Raises:
        RuntimeError: CUDA's own, for memory that is not unified.
    """
    module, context = native(tensor if device.type == "cpu" else torch.empty(0, device=device))
    module.prefetch(tensor, to_cpu, device.index or 0, context)


@lru_cache
def _warn_if_ram(path: Path) -> None:
    kind = _ram_disk(path)
    if kind:
        warnings.warn(
            f"paged optimizer states in {path}, which is a {kind}, that is RAM: "
            "name a directory on a disk with page_dir=... or PYQLORA_PAGE_DIR",
            stacklevel=3,
        )


def _ram_disk(path: Path) -> str | None:
    """tmpfs or ramfs where the path lies on one, else None."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for mount in mounts:  # ID parent major:minor root mount-point options - type source options
        fields, _, source = mount.partition(" - ")
        kind = source.split()[0]
        if fields.split()[2] == number and kind in ("tmpfs", "ramfs"):
            return kind
    return None
