"""GlobalOptimManager: hyperparameters and state widths of single parameters, across all optimizers of the process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class GlobalOptimManager:
    """Overrides per parameter, as in bitsandbytes; the one instance comes from `get_instance()`.

    Example, 32-bit states for one weight of an 8-bit optimizer:

        manager = GlobalOptimManager.get_instance()
        manager.override_config(model.embed.weight, "optim_bits", 32)
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self):
        raise RuntimeError("GlobalOptimManager: call get_instance() instead")

    def initialize(self) -> None:
        """Forget every override."""
        self.pid2config: dict[int, dict[str, Any]] = {}
        self.index2config: dict[tuple[int, int], dict[str, Any]] = {}
        self.uses_config_override = False
        self.module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]] = []

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict]) -> None:
        """Remember the overrides of these parameters by their position, so that they outlive a move to a device."""
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            for index, p in enumerate(group["params"]):
                if id(p) in self.pid2config:
                    self.index2config[group_index, index] = self.pid2config[id(p)]

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Override `key` (lr, betas, eps, weight_decay, optim_bits, min_8bit_size, ...) for these parameters.

        Raises:
            ValueError: neither or both of `key` with `value` and `key_value_dict` were given.
        """
        if (key is not None and value is not None) == (key_value_dict is not None):
            raise ValueError("override_config: expected either key and value, or key_value_dict")
        overrides = {key: value} if key_value_dict is None else key_value_dict
        self.uses_config_override = True
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            self.remember(p, overrides)

    def remember(self, p: Tensor, overrides: dict[str, Any]) -> None:
        """Override the configuration of one parameter for as long as it lives: its id may then be another's."""
        if id(p) not in self.pid2config:
            weakref.finalize(p, self.pid2config.pop, id(p), None).atexit = False
        self.pid2config.setdefault(id(p), {}).update(overrides)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Override the configuration of `module.<param_name>`, looked up when an optimizer takes its next step."""
        self.module_weight_config_triple.append((module, param_name, config))
