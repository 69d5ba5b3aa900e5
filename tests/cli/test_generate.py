from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny_model

from pyqlora.cli.app import run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate")
    tiny_model.save(directory / "model")
    data = tiny_model.pairs(directory / "pairs.jsonl")
    out = str(directory / "out")
    assert run(["finetune", str(directory / "model"), str(data), "-o", out, "--steps", "1"]) == 0
    return out


def test_completes_a_prompt(adapter, capsys):
    printed = []
    for arguments in ([], [], ["--chat"]):
        assert run(["generate", adapter, "1 is", "--max-new-tokens", "6", *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_a_directory_without_an_adapter(tmp_path, capsys):
    assert run(["generate", str(tmp_path), "1 is"]) == 1
    assert "no adapter_config.json there" in capsys.readouterr().err
