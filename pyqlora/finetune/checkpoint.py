"""Checkpoints: all that a run needs to go on as if it had not been interrupted, in safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pyqlora.finetune.files import whole_directory
from pyqlora.finetune.options import CONFIG_FILE, Options

DIRECTORY = "checkpoint"
TENSORS, STATE = "state.safetensors", "state.json"
TENSOR = "tensor"  # in the JSON: the name of the tensor that belongs here


def save(out: Path, model: Any, optimizer: torch.optim.Optimizer, options: Options, state: dict[str, Any]) -> Path:
    """Write OUT/checkpoint: adapter weights, optimizer and RNG as tensors; `state` and the optimizer's numbers as JSON.

    Raises:
        OSError: the checkpoint could not be written; an older one is then still there.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    optimizer_state = take_tensors(optimizer.state_dict()["state"], "optimizer", tensors)
    contents = {**state, "optimizer": optimizer_state}
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
    with safe_open(directory / TENSORS, "pt") as file:
        names = {name.removeprefix("model.") for name in file.keys() if name.startswith("model.")}  # noqa: SIM118
        if names != parameters.keys():
            raise ValueError(f"{directory}: the checkpoint's adapter does not fit this model and its --targets")
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
        optimizer_state = put_tensors(state["optimizer"], file.get_tensor)
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
    by_index = {int(index): values for index, values in optimizer_state.items()}
    groups = optimizer.state_dict()["param_groups"]  # hyperparameters, which the options have set again
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` with every tensor moved into `tensors` and replaced by its name, so that JSON can hold the rest."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, dict):
        return {key: take_tensors(inner, f"{path}.{key}", tensors) for key, inner in value.items()}
    return value


def put_tensors(value: Any, get: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `take_tensors`."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return get(value[TENSOR])
    return {key: put_tensors(inner, get) for key, inner in value.items()}
