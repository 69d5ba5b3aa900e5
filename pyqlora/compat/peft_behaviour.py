"""Where programs count on PEFT behaving otherwise than pyqlora's core: in force while the stand-in is installed."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyqlora import adapter_files, config, inject, tasks
from pyqlora.attention import MultiheadAttention
from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.compat import peft_internals
from pyqlora.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear
from pyqlora.lora_layer import LoraLayer
from pyqlora.parameters import ParamWrapper
from pyqlora.trainable_tokens import TrainableTokens, TrainableTokensWrapper
from pyqlora.tuner import LoraModel


def _get_commit_hash(package: str) -> str | None:
    return None


def format_version() -> str:
    """The version for adapter_config.json: that of `peft.config`, with a commit where it is a development version."""
    module = sys.modules["peft.config"]
    version = getattr(module, "__version__", config.PEFT_FORMAT_VERSION)
    if ".dev" not in version:
        return version
    try:
        commit = module._get_commit_hash("peft")
    except Exception as error:
        warnings.warn(
            f"A dev version of PEFT is used but there was an error while trying to determine the commit hash: {error}",
            stacklevel=4,
        )
        commit = None
    return f"{version}@{commit or 'UNKNOWN'}"


def ignore_unknown(target: type, active: dict[str, Any]) -> None:
    """Warn of settings that the config class does not know, where the core refuses them."""
    warnings.warn(
        f"Unexpected keyword arguments {sorted(active)} for class {target.__name__}, these are ignored. They may be "
        "settings of a newer PEFT, without which the adapter computes something else.",
        stacklevel=5,
    )


def save_pickled(weights: dict[str, Tensor], directory: str) -> str:
    """Write adapter_model.bin, which only `safe_serialization=False` asks for."""
    path = os.path.join(directory, adapter_files.PICKLED_WEIGHTS_NAME)
    torch.save(weights, path + ".tmp")
    os.replace(path + ".tmp", path)
    return path


def load_pickled(path: str) -> dict[str, Tensor]:
    """Read adapter_model.bin, tensors only: nothing in it is run."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _alias(attribute: str) -> property:
    return property(
        lambda layer: getattr(layer, attribute),
        lambda layer, value: setattr(layer, attribute, [value] if isinstance(value, str) else value),
    )


def _original_rows(tokens: TrainableTokens) -> dict[str, Tensor]:
    """Each adapter's rows as the base layer has them."""
    weight = tokens.base_layer.weight.detach()
    return {name: tokens.replaced.get(name, weight[indices]) for name, indices in tokens.token_indices.items()}


_PATH = "peft.tuners.lora.layer"  # where PEFT's classes say they are from, as in its messages

# What programs call on PEFT's classes beside their public methods, and what they find there in place of the core's.
OVERRIDES: dict[Any, dict[str, Any]] = {
    adapter_files: {"save_pickled": save_pickled, "load_pickled": load_pickled},
    config.PeftConfig: {
        "_get_peft_version": staticmethod(format_version),
        "_meet_unknown": staticmethod(ignore_unknown),
    },
    tasks: {"MIXED_MODEL": peft_internals.PeftMixedModel},
    LoraLayer: {
        "adapter_layer_names": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        "_active_adapter": _alias("_active_adapters"),
        "_all_available_adapter_names": lambda layer: sorted(layer.adapters()),
        "__module__": _PATH,
    },
    MultiheadAttention: {"_restore_weights": lambda layer: None, "__module__": _PATH},
    **{kind: {"__module__": _PATH} for kind in (Linear, Embedding, Conv1d, Conv2d, Conv3d, ParamWrapper)},
    **{
        kind: {
            "__module__": "peft.utils.other",
            "_adapters": property(kind.adapters),
            "adapter_layer_names": [],
            "adapter_state_dict_load_map": kind.key_map,
        }
        for kind in (ModulesToSaveWrapper, TrainableTokensWrapper)
    },
    TrainableTokens: {
        "active_adapter": property(lambda tokens: tokens.active_adapters),
        "trainable_tokens_original": property(_original_rows),
    },
    LoraModel: {
        "_get_module_names_tied_with_embedding": peft_internals._get_module_names_tied_with_embedding,
        "get_model_config": staticmethod(inject.model_config),
        "supports_lora_conversion": lambda model, adapter_name="default": False,
    },
}
_ABSENT = object()


class Overrides:
    """Puts OVERRIDES in force and takes them back."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Set every attribute, remembering what was there."""
        for owner, attributes in OVERRIDES.items():
            for name, value in attributes.items():
                self.before.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, value)

    def uninstall(self) -> None:
        """Put back what was there."""
        for owner, name, value in reversed(self.before):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self.before.clear()


class QuantizationBackend:
    """What a layer's `quantization_backend` may be set to; `get_layer_status` shows its name."""

    name = ""

    def __str__(self) -> str:
        return self.name


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes in 4 bits."""

    name = "bnb 4bit"


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes in 8 bits."""

    name = "bnb 8bit"


def init_empty_weights(include_buffers: bool | None = None) -> torch.device:
    """A context in which modules are made on the meta device, buffers too."""
    return torch.device("meta")


def skip_init_on_device(function: Callable) -> Callable:
    """The function with everything it makes on the default device, whatever device is set around its call."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return outside
