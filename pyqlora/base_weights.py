"""The base model's weights under the keys they had before it was adapted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.lora_layer import LoraLayer
from pyqlora.model import PeftModel
from pyqlora.trainable_tokens import TrainableTokensWrapper

# Where an adapted module keeps the one that it stands in for.
ORIGINALS = {
    LoraLayer: "base_layer",
    ModulesToSaveWrapper: "original_module",
    TrainableTokensWrapper: "token_adapter.base_layer",
}


class Mismatch(NamedTuple):
    """Keys that the given weights lack, and those that the model has no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _keys(module: nn.Module, before: str = "", now: str = "") -> Iterator[tuple[str, str]]:
    """(key before adapting, key now) of every entry of a state_dict that is not an adapter's."""
    for kind, path in ORIGINALS.items():
        if isinstance(module, kind):
            yield from _keys(module.get_submodule(path), before, f"{now}{path}.")
            return
    own: dict[str, Tensor] = {}
    module._save_to_state_dict(own, "", False)
    yield from ((before + key, now + key) for key in own)
    for name, child in module.named_children():
        yield from _keys(child, f"{before}{name}.", f"{now}{name}.")


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The base model's state_dict without adapters, under the keys of the model before it was adapted."""
    base = model.get_base_model()
    state = base.state_dict()
    return {before: state[now] for before, now in _keys(base)}


def set_base_model_state_dict(model: PeftModel, state_dict: dict[str, Tensor], strict: bool = True) -> Mismatch:
    """Load weights with the keys of the model before it was adapted; adapters stay as they are.

    Raises:
        RuntimeError: with `strict`, keys that are missing or unexpected; nothing is loaded then.
    """
    base = model.get_base_model()
    keys = dict(_keys(base))
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"set_base_model_state_dict: Missing key(s): {missing or 'none'}; Unexpected key(s): {unexpected or 'none'}"
        )
    base.load_state_dict({keys[key]: value for key, value in state_dict.items() if key in keys}, strict=False)
    return Mismatch(missing, unexpected)
