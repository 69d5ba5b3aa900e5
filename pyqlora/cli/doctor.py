"""`pyqlora doctor`: what this installation is, and what it will run on here."""

from __future__ import annotations


def doctor() -> None:
    """Print the versions, and in the last line whether the kernels run on this machine's GPU, or else on its CPU."""
    import torch

    import pyqlora
    from pyqlora import _C
    from pyqlora.cli import gpus

    build = gpus.installed_build()
    cuda = f"CUDA {build.toolkit} for {' '.join(build.architectures)}" if build.architectures else "no CUDA kernels"
    print(f"pyqlora {pyqlora.__version__} ({cuda}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    torch_has_cuda = torch.version.cuda is not None
    print(f"ok: {gpus.verdict(gpus.visible_gpus(), build, _C.cpu.isa(), gpus.driver_version(), torch_has_cuda)}")
