from __future__ import annotations

import pytest

pytest.importorskip("yaml")

from pyqlora.finetune.options import Options, read_yaml


def test_yaml_round_trip(tmp_path):
    options = Options(model="m", data="d.jsonl", lr=1e-3, steps=7, targets="q_proj,v_proj")
    (tmp_path / "c.yaml").write_text(options.to_yaml())
    assert Options(**read_yaml(tmp_path / "c.yaml")) == options


def test_yaml_takes_numbers_as_people_write_them(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 2e-4\nepochs: 3\nseed: 1\n")  # YAML 1.1 reads 2e-4 as a string
    assert read_yaml(tmp_path / "c.yaml") == {"lr": 2e-4, "epochs": 3.0, "seed": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 3", "unknown option 'rank', expected one of model, data, out, r"),
        ("r: many", "r must be a whole number, got 'many'"),
        ("r: 1.5", r"r must be a whole number, got 1\.5"),
        ("- 1", "expected a mapping of options to values, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_yaml_errors(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "--r must be at least 1, got 0"),
        ({"max_length": 0}, "--max-length must be at least 1, got 0"),
        ({"lr": 0.0}, r"--lr must be above 0, got 0\.0"),
        ({"lr": float("nan")}, "--lr must be above 0, got nan"),
        ({"steps": -1}, "--steps must be above 0, got -1"),
        ({"val": -0.1}, "--val must be a share of the samples below 1, or a number of samples, got -0.1"),
        ({"seed": -1}, "--seed must be 0 or more, got -1"),
        ({"optim": "sgd"}, "--optim 'sgd' is not known, expected one of paged_adamw_8bit, "),
        ({"steps": 1, "minutes": 2.0}, "give only one of --steps, --epochs and --minutes, got --steps and --minutes"),
    ],
)
def test_check(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**values).check()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_targets(targets, expected):
    assert Options(targets=targets).target_modules == expected
