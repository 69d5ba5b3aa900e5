from __future__ import annotations

import importlib.util

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
