"""Which native module serves a tensor, and the `context` that its functions take last."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

try:
    from pyqlora import _C
except ImportError as error:
    raise ImportError(
        "pyqlora's compiled extension is not beside its Python files. In a source checkout: install the package "
        "(pip install .) and run from another directory, or build it in place "
        "(cmake -S . -B build -G Ninja && cmake --build build)."
    ) from error

_override: Any = None


def native(tensor: torch.Tensor) -> tuple[Any, int]:
    """The native submodule for the tensor's device, and its context: torch's thread count or the current CUDA stream.

    Raises:
        ValueError: the tensor is on a device without kernels.
        RuntimeError: the tensor is on a GPU, but this build has no CUDA kernels.
    """
    if _override is not None:
        return _override, 0
    device = tensor.device
    if device.type == "cpu":
        return _C.cpu, torch.get_num_threads()
    if device.type != "cuda":
        raise ValueError(f"pyqlora has kernels for cpu and cuda tensors, got one on {device}")
    if not _C.with_cuda:
        raise RuntimeError(
            "this build of pyqlora has no CUDA kernels: reinstall it where nvcc is on PATH "
            "(pip install --force-reinstall --no-binary pyqlora pyqlora)"
        )
    return _C.cuda, torch.cuda.current_stream(device).cuda_stream


@contextmanager
def override(module: Any):
    """Serve every tensor from `module`: how the tests run the CUDA kernels on emulated device memory."""
    global _override
    before, _override = _override, module
    try:
        yield
    finally:
        _override = before
