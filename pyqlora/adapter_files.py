"""Adapter weights in files: the keys, adapter_model.safetensors, and loading with nothing lost silently.

in memory  base_model.model.<path>.lora_A.<adapter>.weight     base_model.model.<path>.modules_to_save.<adapter>.<key>
in a file  base_model.model.<path>.lora_A.weight               base_model.model.<path>.<key>
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor, nn

from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.config import LoraConfig
from pyqlora.experts import stack_weights
from pyqlora.hub import download
from pyqlora.lora_layer import LoraLayer
from pyqlora.trainable_tokens import TrainableTokensWrapper

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
FSDP = "_fsdp_wrapped_module."  # in the names of modules that FSDP wraps, but not in their keys of the state dict
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` found.

    Attributes:
        missing_keys: parameters of the adapter, by their names in memory, that the file lacks.
        unexpected_keys: keys of the file that the model has no place for.
        misshapen_keys: (key, shape in the file, shape in the model) of parameters that were left as they were.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    misshapen_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def find_file(model_id: str, name: str, subfolder: str | None = None, **where: Any) -> str | None:
    """The path of a file of an adapter: in a directory, or fetched from the hub if huggingface_hub is installed."""
    folder = os.path.join(model_id, subfolder) if subfolder else str(model_id)
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        return path
    if os.path.isdir(folder) or "/" not in str(model_id):  # the hub's names are owner/name
        return None
    return download(str(model_id), f"{subfolder}/{name}" if subfolder else name, **where)


def file_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key in the file -> key in the model's state dict, for each parameter of the adapter."""
    keys = {}
    for path, module in model.named_modules():
        prefix = f"{path}.".replace(FSDP, "") if path else ""
        if isinstance(module, LoraLayer):
            for kind, held in module.parameter_dicts().items():
                if adapter_name not in held:
                    continue
                if isinstance(held[adapter_name], Tensor):
                    keys[f"{prefix}{kind}"] = f"{prefix}{kind}.{adapter_name}"
                    continue
                for key in held[adapter_name].state_dict():
                    # PEFT writes DoRA's magnitudes without the ".weight" of the module that holds them.
                    stored = "" if kind == "lora_magnitude_vector" else f".{key}"
                    keys[f"{prefix}{kind}{stored}"] = f"{prefix}{kind}.{adapter_name}.{key}"
        elif isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            keys.update({prefix + key: prefix + own for key, own in module.key_map(adapter_name).items()})
    return keys


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's weights under the keys of a file, with biases and embeddings that belong to it.

    Args:
        model: a PeftModel, or a model into which an adapter was injected.
        state_dict: the model's state dict, if it was gathered elsewhere (FSDP, DeepSpeed).
        adapter_name: which adapter.
        unwrap_compiled: look inside a torch.compile wrapper.
        save_embedding_layers: also the input and output embeddings; "auto" if target_modules names one.

    Raises:
        ValueError: no such adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter named '{adapter_name}' in this model, it has {sorted(model.peft_config)}")
    config = model.peft_config[adapter_name]
    state = model.state_dict() if state_dict is None else state_dict
    result = {key: state[own] for key, own in file_keys(model, adapter_name).items() if own in state}
    result.update({key: state[key] for key in _bias_keys(model, config, state)})
    result.update({key: state[key] for key in _embedding_keys(model, config, state, save_embedding_layers)})
    if state_dict is None:
        _check_shapes(result, adapter_name)
    return result


def _bias_keys(model: nn.Module, config: LoraConfig, state: dict[str, Tensor]) -> list[str]:
    if config.bias == "all":
        return [key for key in state if key == "bias" or (key.endswith(".bias") and ".lora_B." not in key)]
    if config.bias == "lora_only":
        paths = [path.replace(FSDP, "") for path, module in model.named_modules() if isinstance(module, LoraLayer)]
        return [key for key in (f"{path}.base_layer.bias" for path in paths) if key in state]
    return []


def _embedding_keys(model: nn.Module, config: LoraConfig, state: dict[str, Tensor], wanted: bool | str) -> list[str]:
    """Keys of embeddings to save whole: those targeted, since they may have been resized for new tokens."""
    if wanted == "auto":
        targets = config.target_modules
        if isinstance(targets, str):
            names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in EMBEDDING_NAMES]
            names = [name.removeprefix(PREFIX) for name in names]
            wanted = targets != "all-linear" and any(re.fullmatch(targets, name) for name in names)
        else:
            wanted = any(name in (targets or ()) for name in EMBEDDING_NAMES)
        wanted = wanted and config.trainable_token_indices is None
        if wanted:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4
            )
    if not wanted:
        return []
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=4
        )
        return []
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers if layer is not None]
    paths = [path for path, module in model.named_modules() if any(module is base for base in bases)]
    return [key for key in state if key.startswith(tuple(f"{path}." for path in paths))] if paths else []


def _check_shapes(weights: dict[str, Tensor], adapter_name: str) -> None:
    bad = [
        f"{key}:{tuple(value.shape)}"
        for key, value in weights.items()
        if key.endswith((".lora_A.weight", ".lora_B.weight")) and (value.dim() < 2 or 0 in value.shape)
    ]
    if bad:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {', '.join(bad[:3])}. A 1-D or "
            "zero-sized tensor is one shard of a parameter that was not gathered: save inside "
            "deepspeed.zero.GatheredParameters or FSDP's summon_full_params.",
            stacklevel=3,
        )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy weights with the keys of a file into an adapter that the model has.

    Args:
        model: a PeftModel, or a model into which the adapter was injected.
        peft_model_state_dict: the weights.
        adapter_name: the adapter to fill.
        ignore_mismatched_sizes: leave parameters of another shape as they are, with a warning.
        low_cpu_mem_usage: the adapter lies on the meta device; the tensors given take the place of its parameters.

    Raises:
        RuntimeError: shapes differ; all that do are listed.
    """
    keys = file_keys(model, adapter_name)
    expected = list(keys.values())
    own_state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    all_state = model.state_dict()
    prefixed = any(name.startswith(PREFIX) for name in own_state)
    weights = {key if prefixed else key.removeprefix(PREFIX): value for key, value in peft_model_state_dict.items()}
    keys = {**{key: key for key in all_state}, **keys}
    weights = by_own_names(model, weights, keys, PREFIX if prefixed else "")
    placed = {keys[key]: value for key, value in weights.items() if key in keys}
    unexpected = [key for key in weights if key not in keys]
    missing = [own for own in expected if own not in placed]
    misshapen = [
        (key, tuple(value.shape), tuple(all_state[key].shape))
        for key, value in placed.items()
        if value.shape != all_state[key].shape
    ]
    if misshapen:
        listed = "\n".join(f"  {key}: {given} in the file, {own} in the model" for key, given, own in misshapen)
        if not ignore_mismatched_sizes:
            raise RuntimeError(
                f"Error(s) in loading adapter '{adapter_name}': size mismatch for {len(misshapen)} parameters, as from "
                f"another base model or rank:\n{listed}"
            )
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            f"ignored because you passed `ignore_mismatched_sizes=True`:\n{listed}",
            stacklevel=2,
        )
        for key, _, _ in misshapen:
            del placed[key]
    model.load_state_dict(placed, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.move_adapter(adapter_name)
    return LoadResult(missing, unexpected, misshapen)


def by_own_names(
    model: nn.Module, weights: dict[str, Tensor], places: Collection[str], prefix: str
) -> dict[str, Tensor]:
    """The weights, those among them that have no place by the names that transformers gives to an older checkpoint."""
    strange = {key.removeprefix(prefix): value for key, value in weights.items() if key not in places}
    if not strange:
        return weights
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {key.removeprefix(prefix) for key in places}
    renamed = {prefix + key: value for key, value in stack_weights(base, strange, known).items()}
    return {**{key: value for key, value in weights.items() if key in places}, **renamed}


def save_adapter(weights: dict[str, Tensor], directory: str) -> str:
    """Write adapter_model.safetensors, under a temporary name until it is whole; returns its path."""
    seen: set[int] = set()
    plain = {}
    for key, value in weights.items():
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        plain[key] = value.detach().clone().contiguous() if shared else value.detach().contiguous()
    path = os.path.join(directory, WEIGHTS_NAME)
    partial = path + ".tmp"
    try:
        safetensors.torch.save_file(plain, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return path


def save_pickled(weights: dict[str, Tensor], directory: str) -> str:
    """Refuse to write adapter_model.bin."""
    raise ValueError("safe_serialization=False would write a pickle; pyqlora saves safetensors only")


def load_pickled(path: str) -> dict[str, Tensor]:
    """Refuse to read adapter_model.bin."""
    raise ValueError(
        f"{path} is a pickle, which can run code when loaded; convert it to {WEIGHTS_NAME} with safetensors in an "
        "environment where you trust it"
    )


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """An adapter's weights from a directory or the hub.

    Args:
        model_id: directory or repository id.
        device: where to put the tensors; None for the CPU.
        key_mapping: regular expressions and replacements for keys, matched without "base_model.model.".
        hub: subfolder, revision, token, …

    Raises:
        ValueError: no weights there, a damaged file, or only pickled ones, which can run code when loaded.
    """
    path = find_file(model_id, WEIGHTS_NAME, **hub)
    if path is None:
        path = find_file(model_id, PICKLED_WEIGHTS_NAME, **hub)
        if path is None:
            raise ValueError(
                f"Can't find weights for {model_id}: no {WEIGHTS_NAME} there, nor on the hub under that name"
            )
        weights = load_pickled(path)
    else:
        try:
            weights = safetensors.torch.load_file(path, device=str(device or "cpu"))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is damaged, as when writing or copying it stopped early ({error}); fetch or save it again"
            ) from error
    if not key_mapping:
        return weights
    renamed = {}
    for key, value in weights.items():
        key = key.removeprefix(PREFIX)
        for pattern, replacement in key_mapping.items():
            changed, count = re.subn(pattern, re.sub(r"\(.*\)", "", replacement.lstrip("^")), key)
            if count:
                key = changed
                break
        renamed[PREFIX + key] = value
    return renamed
