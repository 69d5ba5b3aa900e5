"""ModulesToSaveWrapper: a module that is trained and saved whole, one copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora import dense
from pyqlora.config import LoraConfig
from pyqlora.lora_layer import LoraLayer
from pyqlora.rows import BASE_ROW, names_of_rows


class ModulesToSaveWrapper(nn.Module):
    """Stands in for `original_module` and runs the active adapter's copy of it.

    Keys in memory are `<path>.modules_to_save.<adapter>.<key>`, in a file `<path>.<key>`.
    """

    def __init__(self, module: nn.Module, adapter_name: str):
        super().__init__()
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList, LoraLayer)):
            raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module)}")
        if any(dense.is_4bit(child) for child in module.modules()):
            raise TypeError(
                f"modules_to_save: the {type(module).__name__} is quantized to 4 bits and cannot be trained; "
                "load the model with this module in llm_int8_skip_modules, or adapt it through target_modules"
            )
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter: str | None = None
        self._disable_adapters = False
        self.update(adapter_name)

    def update(self, adapter_name: str) -> None:
        """Add an adapter's copy of the original module."""
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module).requires_grad_(False)
        self.original_module.requires_grad_(False)

    @property
    def active_adapters(self) -> list[str]:
        """The adapter whose copy runs, if any."""
        return [] if self._active_adapter is None else [self._active_adapter]

    @property
    def active_adapter(self) -> list[str]:
        """As active_adapters."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the original module runs whatever is active."""
        return self._disable_adapters

    def adapters(self) -> set[str]:
        """Names of the adapters that have a copy."""
        return set(self.modules_to_save)

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The parameters of one adapter's copy, or of all."""
        return [p for key, module in self.modules_to_save.items() if name in (None, key) for p in module.parameters()]

    def running(self) -> nn.Module:
        """The module that a forward pass runs."""
        if self._disable_adapters or self._active_adapter is None:
            return self.original_module
        return self.modules_to_save[self._active_adapter]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "original_module" not in self._modules:
                raise
            if not self._disable_adapters and {self._active_adapter} - {None} - self.adapters():
                raise
            return getattr(self.running(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The running module's output; with adapter_names, each row by its own adapter's copy."""
        given = kwargs.pop("adapter_names", None)
        names = names_of_rows(len(args[0]), given) if args else None
        if names is None or self._disable_adapters:
            return self.running()(*args, **kwargs)
        return self._forward_rows(names, *args, **kwargs)

    def _forward_rows(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if not isinstance(self.original_module, kinds):
            listed = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"Mixed batching is only supported for the following modules: {listed}.")
        rows: list[Any] = [None] * len(names)
        for name in dict.fromkeys(names):
            indices = [i for i, other in enumerate(names) if other == name]
            own = name != BASE_ROW and name in self.modules_to_save
            module = self.modules_to_save[name] if own else self.original_module
            for i, row in zip(indices, module(x[indices], *args, **kwargs), strict=True):
                rows[i] = row
        return torch.stack(rows)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Run and train the copy of the one named adapter that has one; of none, the original module.

        Raises:
            ValueError: more than one of the adapters has a copy.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [name for name in names if name in self.modules_to_save]
        if len(mine) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(mine)}")
        self._active_adapter = mine[0] if mine else None
        for name in self.adapters():
            self.set_requires_grad(name, name in mine and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze the adapters' copies."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names & self.adapters():
            for parameter in self.modules_to_save[name].parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Run the active copy, or the original module; a copy is frozen while disabled."""
        if enabled and self._disable_adapters:
            self.set_requires_grad(self.active_adapters, True)
        elif not enabled:
            self.set_requires_grad(self.adapters(), False)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter's copy; the one among the new active adapters that has a copy takes its place."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
            self.set_adapter(new_active_adapters or [])

    def key_map(self, adapter_name: str) -> dict[str, str]:
        """File key -> key in memory of the adapter's copy, both relative to this module."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in self.modules_to_save[adapter_name].state_dict()}

    def unloaded(self, merge: bool, adapter_names: list[str] | None = None) -> nn.Module:
        """The module to leave in the model: the active copy, or the original one when not merging."""
        return self.modules_to_save[self._active_adapter] if merge and self._active_adapter else self.original_module


def raise_inside_lora(wrapper: type, layer: LoraLayer, adapter_name: str) -> None:
    """The error for a name that matches a part of a LoRA layer, as an adapter's own name may."""
    raise ValueError(
        f"You are trying to target a module with {wrapper} that is a child of {type(layer)}. This is almost certainly "
        f"not the intended behavior. Please ensure that the adapter name, '{adapter_name}', does not conflict with any "
        "of the targeted modules."
    )


def wrap_modules_to_save(
    model: nn.Module, config: LoraConfig, adapter_name: str, active: bool, tied: list[str]
) -> None:
    """Give the adapter its copy of every module whose name ends in one of modules_to_save, or is one of `tied`.

    The copies of those named in `tied` share one weight.

    Raises:
        ValueError: a name that no module has, or one inside a LoRA layer.
    """
    wanted = (*(config.modules_to_save or ()), *tied)
    if not wanted:
        return
    wrapped: dict[nn.Module, ModulesToSaveWrapper] = {}
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if (inside and name.startswith(inside)) or not name.endswith(wanted):
            continue
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(model.get_submodule(parent_name.rpartition(".")[0]), LoraLayer):
            raise_inside_lora(ModulesToSaveWrapper, model.get_submodule(parent_name.rpartition(".")[0]), adapter_name)
        inside += (f"{name}.",)
        wrapper = module if isinstance(module, ModulesToSaveWrapper) else wrapped.get(module)
        if wrapper is None:
            wrapper = wrapped[module] = ModulesToSaveWrapper(module, adapter_name)
        if wrapper is not module:
            setattr(parent, child_name, wrapper)
        wrapper.update(adapter_name)
        wrapper.set_adapter(adapter_name if active else wrapper.active_adapters, config.inference_mode)
    copies = [model.get_submodule(name).modules_to_save[adapter_name] for name in tied]
    for other in copies[1:]:
        other.weight = copies[0].weight
