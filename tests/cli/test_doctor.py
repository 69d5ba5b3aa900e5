import pytest

pytest.importorskip("typer")

import torch

from pyqlora import _C, __version__
from pyqlora.cli.app import run
from pyqlora.cli.gpus import Build, installed_build


def test_what_it_prints(capsys):
    assert run(["doctor"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert __version__ in first and torch.__version__ in first
    assert last.startswith("ok: ") and (torch.cuda.is_available() or f"CPU with {_C.cpu.isa()} kernels" in last)


def test_build():
    build = installed_build()
    assert bool(build.architectures) == bool(build.toolkit) == _C.with_cuda
    assert isinstance(build, Build)
