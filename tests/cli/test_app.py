from __future__ import annotations

import pytest

pytest.importorskip("typer")

from pyqlora.cli.app import COMMANDS, run


def test_help_says_every_command_in_a_whole_line(capsys):
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split(maxsplit=1) for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
    assert listed == [[command.__name__, summary] for command, summary in COMMANDS.items()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(capsys, command):
    assert run([command.__name__, "--help"]) == 0
    assert f"Usage: pyqlora {command.__name__} [OPTIONS]" in capsys.readouterr().out


def test_a_misspelt_command(capsys):
    assert run(["chatt"]) == 1
    assert capsys.readouterr().err.startswith("error: No such command 'chatt'.")
