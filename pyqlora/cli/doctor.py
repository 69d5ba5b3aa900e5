"""`pyqlora doctor`: what this installation is, and what it will run on here; with an adapter, see examine.py."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    adapter: Annotated[str | None, typer.Argument(help="Directory of an adapter to examine.")] = None,
    model: Annotated[str | None, typer.Option(help="Its base model [the one it names].")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print the versions, and in the last line whether the kernels run on this machine's GPU, or else on its CPU.

    With ADAPTER: what it is, whether it fits its base model, and what is wrong with it.
    """
    if adapter is not None:
        from pyqlora.cli.examine import examine

        examine(adapter, model)
        return
    if model is not None:
        raise ValueError("--model names an adapter's base model: pyqlora doctor ADAPTER --model MODEL")
    import torch

    import pyqlora
    from pyqlora import _C
    from pyqlora.cli import gpus

    build = gpus.installed_build()
    cuda = f"CUDA {build.toolkit} for {' '.join(build.architectures)}" if build.architectures else "no CUDA kernels"
    print(f"pyqlora {pyqlora.__version__} ({cuda}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    torch_has_cuda = torch.version.cuda is not None
    print(f"ok: {gpus.verdict(gpus.visible_gpus(), build, _C.cpu.isa(), gpus.driver_version(), torch_has_cuda)}")
