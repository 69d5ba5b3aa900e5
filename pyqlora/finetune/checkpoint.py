"""Checkpoints: all that a run needs to go on as if it had not been interrupted, in safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyqlora.finetune.files import whole_directory
from pyqlora.finetune.options import CONFIG_FILE, Options

DIRECTORY = "checkpoint"
TENSORS, STATE = "state.safetensors", "state.json"


def save(out: Path, model: Any, optimizer: torch.optim.Optimizer, options: Options, state: dict[str, Any]) -> Path:
    """Write OUT/checkpoint: adapter weights, optimizer and RNG as tensors; `state` and the optimizer's numbers as JSON.

    Raises:
        OSError: the checkpoint could not be written; an older one is then still there.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    saved = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    contents = {**state, "optimizer": numbers, "groups": saved["param_groups"]}
    with whole_directory(out / DIRECTORY) as directory:
        # A clone each: safetensors refuses tensors that share memory, as the optimizer's quantization maps do.
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, directory / TENSORS)
        (directory / STATE).write_text(json.dumps(contents), encoding="utf-8")
        (directory / CONFIG_FILE).write_text(options.to_yaml(), encoding="utf-8")
    return out / DIRECTORY


def find(path: str | Path) -> Path:
    """The checkpoint directory at `path`, or in it.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    for directory in (path, path / DIRECTORY):
        if all((directory / name).is_file() for name in (TENSORS, STATE, CONFIG_FILE)):
            return directory
    raise ValueError(f"--resume {path}: no checkpoint there, expected {path}/{DIRECTORY} with {STATE} and {TENSORS}")


def load_state(directory: Path) -> dict[str, Any]:
    """The `state` given to `save`, and the optimizer's numbers.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads((directory / STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / STATE}: not a checkpoint's state: {error}") from error


def restore(directory: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put adapter weights, optimizer and RNG back as they were saved.

    Raises:
        ValueError: the checkpoint's adapter is not this model's.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer_state = {int(index): dict(values) for index, values in state["optimizer"].items()}
    with safe_open(directory / TENSORS, "pt") as file:
        names = {name.removeprefix("model.") for name in file.keys() if name.startswith("model.")}  # noqa: SIM118
        if names != parameters.keys():
            raise ValueError(f"{directory}: the checkpoint's adapter does not fit this model and its --targets")
        for name in file.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            value = file.get_tensor(name)
            if kind == "model":
                parameters[rest].data.copy_(value)
            elif kind == "optimizer":
                index, _, key = rest.partition(".")
                optimizer_state.setdefault(int(index), {})[key] = value
            elif rest == "cpu":
                torch.set_rng_state(value)
            else:
                torch.cuda.set_rng_state(value)
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["groups"]})
