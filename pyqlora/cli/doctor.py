"""`pyqlora doctor`: what this installation can use, in one line."""

from __future__ import annotations


def doctor() -> None:
    """Print version, device, instruction set and CUDA in one line."""
    import torch

    import pyqlora
    from pyqlora import _C

    if not _C.with_cuda:
        cuda = "CUDA no (built without nvcc)"
    elif not torch.cuda.is_available():
        cuda = "CUDA no (built in, but torch sees no GPU)"
    else:
        cuda = f"CUDA yes ({torch.cuda.get_device_name()})"
    threads = torch.get_num_threads()
    print(
        f"ok: pyqlora {pyqlora.__version__}, torch {torch.__version__}, CPU {_C.cpu.isa()} x {threads} threads, {cuda}"
    )
