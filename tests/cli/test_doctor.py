import pytest

pytest.importorskip("typer")

from pyqlora import _C, __version__
from pyqlora.cli.app import run


def test_one_line(capsys):
    assert run(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    for part in ("ok:", __version__, "torch", _C.cpu.isa(), "CUDA"):
        assert part in printed
