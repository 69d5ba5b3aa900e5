from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("typer")

from pyqlora.cli import bench
from pyqlora.cli.app import run


@pytest.mark.parametrize(
    "absent, text", [("benchmarks", "run this in a source checkout"), ("peft", "pip install peft")]
)
def test_what_is_missing_is_named(monkeypatch, capsys, absent, text):
    find = importlib.util.find_spec
    present = object()
    found = dict.fromkeys(("benchmarks", "benchmarks.harness", *bench.PEERS), present) | {absent: None}
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: found[name] if name in found else find(name))
    assert run(["bench"]) == 1
    assert text in capsys.readouterr().err


def test_arguments_reach_the_benchmarks(monkeypatch):
    calls = []
    module = type("Module", (), {"main": staticmethod(calls.append)})
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: module)
    assert run(["bench", "step", "--rounds", "3", "--json", "out.json"]) == 0
    assert calls == [["step", "--threads", "1", "--rounds", "3", "--json", "out.json"]]


def test_a_wheel_brings_them(monkeypatch, tmp_path, capsys):
    """Where pyproject.toml puts them; the working directory's come first."""
    packages = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"pyqlora/measuring/benchmarks" = "benchmarks"' in packages
    assert bench.INSTALLED.parts[-2:] == ("pyqlora", "measuring")
    main = "def main(arguments):\n    print('measured', arguments)\n"
    for name, text in {"__init__": "", "harness": "", "__main__": main}.items():
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / f"{name}.py").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "benchmarks").is_dir()])
    monkeypatch.setattr(bench, "INSTALLED", tmp_path)
    monkeypatch.setattr(bench, "PEERS", ())
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]
        assert run(["bench", "--rounds", "2"]) == 0
    assert "measured ['--threads', '1', '--rounds', '2']" in capsys.readouterr().out
