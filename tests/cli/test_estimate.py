from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny_model

from pyqlora.cli.app import run


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.model().config.save_pretrained(path)  # a config and nothing else
    return path


@pytest.mark.parametrize("device", ["cpu", "24", "0.5GB"])
def test_prints_parts_and_what_fits(directory, capsys, device):
    assert run(["estimate", str(directory), "--device", device, "--r", "8"]) == 0
    out = capsys.readouterr().out
    assert "adapter of rank 8 on all of these: 0.0 M parameters, paged_adamw_8bit" in out
    assert ("computing in float32" if device == "cpu" else "computing in bfloat16") in out
    for row in ("weights", "constants", "workspace", "total", "largest batch of 512 tokens"):
        assert sum(line.startswith(row) for line in out.splitlines()) == 1, row
    assert ("Python and libraries" in out) == (device == "cpu")
    assert out.split("fits")[1].split()[:3] == ["yes"] * 3


def test_a_config_file_is_enough(directory, capsys):
    file = directory / "other.json"
    file.write_text(json.dumps(json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": 1}))
    assert run(["estimate", str(file), "--device", "24"]) == 0
    one = capsys.readouterr().out
    assert run(["estimate", str(directory), "--device", "24"]) == 0
    assert one.splitlines()[0].split(":")[1] != capsys.readouterr().out.splitlines()[0].split(":")[1]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--device", "huge"], "--device 'huge': expected cpu"),
        (["--dtype", "int8"], "--dtype must be float32 or bfloat16, got 'int8'"),
        (["--optim", "sgd"], "--optim 'sgd' is not known, expected one of paged_adamw_8bit"),
        (["--checkpointing", "all"], "--checkpointing 'all' is not known, expected none, selective, full"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_errors(directory, capsys, arguments, text):
    assert run(["estimate", str(directory), *arguments]) == 1
    assert text in capsys.readouterr().err


def test_a_model_that_is_none(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert run(["estimate", str(tmp_path)]) == 1
    assert "describes no causal language model" in capsys.readouterr().err
