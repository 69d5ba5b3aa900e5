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

_override: tuple[Any, int] | None = None
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
# As torch.cuda.current_stream(device).cuda_stream, which takes longer than a kernel's launch. Not in a torch for CPUs.
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def native(tensor: torch.Tensor) -> tuple[Any, int]:
    """The native submodule for the tensor's device, and its context: torch's thread count or the current CUDA stream.

    Raises:
        ValueError: the tensor is on a device without kernels.
        RuntimeError: the tensor is on a GPU, but this build has no CUDA kernels.
    """
    if _override is not None:
        return _override
    if tensor.is_cpu:
        return _C.cpu, torch.get_num_threads()
    if not tensor.is_cuda:
        raise ValueError(f"pyqlora has kernels for cpu and cuda tensors, got one on {tensor.device}")
    if not _C.with_cuda:
        raise RuntimeError(
            "this build of pyqlora has no CUDA kernels: reinstall it where nvcc is on PATH "
            "(pip install --force-reinstall --no-binary pyqlora pyqlora)"
        )
    return _C.cuda, _stream_of(tensor.get_device())


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether CUDA kernels serve the tensor."""
    return _override is not None or (tensor.is_cuda and _C.with_cuda)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether kernels may be called on it directly, past torch's dispatcher: it has memory, and nothing is watching.

    False while compiling, in a dispatch mode (fake tensors, tracing, counting), in a functorch transform, and for
    tensor subclasses.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not _is_compiling()
        and not _dispatch_modes()
        and _transform() is None
    )


def is_fast() -> bool:
    """Whether the CPU kernels run with the vectors of an x86 processor: those beside torch's own are slow without."""
    return _C.cpu.isa() != "scalar"


def fast_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether CPU kernels serve the tensors, called directly, and are fast."""
    return all(is_plain(t) and t.is_cpu and not on_gpu(t) for t in tensors) and is_fast()


@contextmanager
def override(module: Any, context: int = 0):
    """Serve every tensor from `module`: how the tests run the CUDA kernels on emulated device memory.

    None goes back to the tensors' own devices; `context` is the stream.
    """
    global _override
    before, _override = _override, None if module is None else (module, context)
    try:
        yield
    finally:
        _override = before
