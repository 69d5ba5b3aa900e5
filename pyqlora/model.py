"""PeftModel and its task classes: the adapted model that the user trains, saves, loads and merges."""

from __future__ import annotations

import inspect
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyqlora import adapter_files, dense, kbit
from pyqlora.adapter_files import (
    LoadResult,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from pyqlora.config import PeftConfig
from pyqlora.conversion import as_plain_lora, splitting_method
from pyqlora.gradient_check import check_first_backward
from pyqlora.integrations import adopt
from pyqlora.model_card import write_model_card
from pyqlora.plans import keeping_plans
from pyqlora.tuner import LoraModel
from pyqlora.turns import in_turn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of any model; a 4-bit weight counts by its elements, not its bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        count = dense.numel(parameter)
        total += count
        trainable += count * parameter.requires_grad
    return trainable, total


class PeftModel(nn.Module):
    """A model with adapters. Everything that is not about adapters is the wrapped model's own.

    Args:
        model: the model to adapt; it is changed in place.
        peft_config: the first adapter's config.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters in float32 where the base model is in half precision.
        low_cpu_mem_usage: make the adapter on the meta device, for weights that are loaded next.
    """

    # transformers' Trainer takes this to mean that a quantized model has something to train.
    _hf_peft_config_loaded = True
    modules_always_saved: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        self._gradient_checked = False
        self._add_saved_modules(peft_config)
        self.base_model = LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage)
        if hasattr(model, "config"):
            self.config = model.config
        self.peft_type = peft_config.peft_type
        self.train(model.training)
        if autocast_adapter_dtype:
            self.base_model.cast_adapter(adapter_name)
        if kbit.uses_gradient_checkpointing(model) and hasattr(model, "get_input_embeddings"):
            kbit.require_input_grads(model)
        if not peft_config.inference_mode:
            adopt(model)

    def _add_saved_modules(self, config: PeftConfig) -> None:
        """A head that the task adds to the base model starts from random values: it must be trained and saved."""
        extra = [name for name in self.modules_always_saved if name not in (config.modules_to_save or ())]
        if extra:
            config.modules_to_save = [*(config.modules_to_save or ()), *extra]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # --- what runs ---------------------------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with the LoRA layers in it."""
        return self.base_model.model

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's forward; with `adapter_names`, every row of the batch with its own adapter."""
        with self.base_model.rows(adapter_names):
            output = self.get_base_model()(*args, **kwargs)
        watch = self.training and not self._gradient_checked and torch.is_grad_enabled()
        if watch and not torch.compiler.is_compiling():
            check_first_backward(output, self._trainable_adapter_parameters, self._gradient_was_checked)
        return output

    def _trainable_adapter_parameters(self) -> list[nn.Parameter]:
        parameters = (p for layer in self.base_model.lora_layers() for p in layer.adapter_parameters())
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _gradient_was_checked(self) -> None:
        self._gradient_checked = True

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's generate; `adapter_names` as in forward.

        On a CPU, adapted layers find their parameters once in a call: see `pyqlora.plans`.
        """
        model = self.get_base_model()
        if "generation_config" in self.__dict__:
            model.generation_config = self.generation_config
        with self.base_model.rows(adapter_names, kwargs.get("num_beams")), keeping_plans():
            return model.generate(*args, **kwargs)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the wrapped model's forward takes num_items_in_batch, which transformers' Trainer asks."""
        model = self.get_base_model()
        if hasattr(model, "accepts_loss_kwargs"):
            return model.accepts_loss_kwargs
        parameters = inspect.signature(model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """Turn on gradient checkpointing in the wrapped model, so that gradients reach every adapter."""
        kbit.enable_gradient_checkpointing(self.get_base_model(), gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """As gradient_checkpointing_enable, under the name that newer transformers use."""
        kbit.enable_gradient_checkpointing(self.get_base_model(), activation_checkpointing_kwargs)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the embeddings' output require a gradient."""
        kbit.require_input_grads(model)

    # --- adapters ----------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter by its name."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The (first) adapter in use; an empty string if there is none."""
        return next(iter(self.active_adapters), "")

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the adapter in use."""
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter trains whole."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The wrapped model's dtype, if it has one."""
        return getattr(self.base_model, "dtype", None)

    @in_turn
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter; `set_adapter` makes it the active one.

        Raises:
            ValueError: the name is taken, or the config fits nothing; the model is then as before.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        self._add_saved_modules(peft_config)
        self.peft_config[adapter_name] = peft_config
        try:
            self.base_model.inject_adapter(self.get_base_model(), adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        if autocast_adapter_dtype:
            self.base_model.cast_adapter(adapter_name)

    @in_turn
    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a saved adapter beside those that the model has, or anew into the one of that name.

        Args:
            model_id: its directory, or repository on the hub.
            adapter_name: what to call it here.
            is_trainable: train it further; else it is frozen and the model goes to eval mode.
            torch_device: where the file is read to; the adapter lies beside its base layers in any case.
            autocast_adapter_dtype: keep half-precision weights of the adapter in float32.
            ephemeral_gpu_offload: accepted as in PEFT.
            low_cpu_mem_usage: do not initialise what is about to be overwritten.
            key_mapping: regular expressions and replacements for the file's keys.
            ignore_mismatched_sizes: skip parameters of another shape with a warning.
            kwargs: for the hub: subfolder, revision, token, …

        Returns:
            The missing, unexpected and misshapen keys; warnings list them.
        """
        if adapter_name not in self.peft_config:
            config = PeftConfig.from_pretrained(str(model_id), **kwargs)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
            methods = {splitting_method(other) for other in self.peft_config.values()} - {None}
            if methods and len(self.peft_config) > 1:
                warnings.warn(
                    f"{' and '.join(sorted(methods, reverse=True))} changes the base weights of the model and should "
                    "thus not be used with other adapters. With path_initial_model_for_weight_conversion, "
                    "save_pretrained writes such an adapter as plain LoRA.",
                    stacklevel=2,
                )
            if is_trainable:
                self.set_requires_grad(adapter_name)
        weights = load_peft_weights(str(model_id), device=torch_device, key_mapping=key_mapping, **kwargs)
        result = set_peft_model_state_dict(self, weights, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
        if result.missing_keys:
            warnings.warn(
                f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}.", stacklevel=2
            )
        if result.unexpected_keys:
            warnings.warn(
                f"Found unexpected keys while loading the checkpoint, for which the model has no place: "
                f"{result.unexpected_keys}.",
                stacklevel=2,
            )
        if autocast_adapter_dtype:
            self.base_model.cast_adapter(adapter_name)
        if not is_trainable:
            self.eval()
        return result

    @in_turn
    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use one adapter; train it, and no other, unless `inference_mode`.

        Raises:
            ValueError: no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} not found. The model has {sorted(self.peft_config)}.")
        self.base_model.set_adapter(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @in_turn
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While open, the model computes what the base model computes."""
        layers = list(self.base_model.adapted())
        was_disabled = {id(layer): layer.disable_adapters for layer in layers}
        if len(set(was_disabled.values())) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        try:
            self.base_model.disable_adapter_layers()
            yield
        finally:
            if not all(was_disabled.values()):
                self.base_model.enable_adapter_layers()

    # --- counting ----------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a 4-bit weight counts by its elements, not its bytes."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the share, in PEFT's line."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list:
        """See pyqlora.get_layer_status."""
        from pyqlora.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """See pyqlora.get_model_status."""
        from pyqlora.status import get_model_status

        return get_model_status(self)

    # --- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write each adapter's config and weights: "default" into the directory, others into one of their name in it.

        Args:
            save_directory: made if missing.
            safe_serialization: True; there is no other way.
            selected_adapters: which adapters; None for all.
            save_embedding_layers: also the input and output embeddings; "auto" if target_modules names one.
            is_main_process: False gathers the weights and writes nothing.
            path_initial_model_for_weight_conversion: where a PiSSA or OLoRA adapter was saved before training; it is
                then written as plain LoRA, for the base model as it was before.
            state_dict: the model's state dict, if it was gathered elsewhere.

        Raises:
            ValueError: the path is a file, an unknown adapter, safe_serialization=False, which would pickle, or see
                pyqlora.conversion.as_plain_lora.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        if any(name not in self.peft_config for name in names):
            raise ValueError(
                "You passed an invalid `selected_adapters` arguments, current supported adapter names are"
                f" {list(self.peft_config)} - got {selected_adapters}."
            )
        for name in names:
            weights = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            if not is_main_process:
                continue
            directory = save_directory if name == "default" else os.path.join(save_directory, name)
            os.makedirs(directory, exist_ok=True)
            config = self.peft_config[name]
            if path_initial_model_for_weight_conversion is not None:
                config, weights = as_plain_lora(config, weights, path_initial_model_for_weight_conversion)
            (adapter_files.save_adapter if safe_serialization else adapter_files.save_pickled)(weights, directory)
            self._save_config(config, directory)
            write_model_card(self, config, directory)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Save the adapters into a repository on the hub, which is made if missing; returns the commit's address.

        Args:
            repo_id: its name.
            private: make a new repository a private one.
            token: of the hub; default the one stored on this machine.
            kwargs: for huggingface_hub's upload_folder: commit_message, revision, create_pr, …
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **kwargs))

    def _save_config(self, config: PeftConfig, directory: str) -> None:
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        mapping = None
        if config.task_type is None:
            mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        inference_mode, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(directory, auto_mapping_dict=mapping)
        finally:
            config.inference_mode = inference_mode

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter onto a model, which is changed in place; arguments as in `load_adapter`.

        Raises:
            ValueError: no adapter there, or it does not fit the model.
        """
        if config is None:
            config = PeftConfig.from_pretrained(str(model_id), **kwargs)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        from pyqlora.tasks import TASK_MODELS

        config.inference_mode = not is_trainable
        kind = TASK_MODELS.get(config.task_type, cls)
        peft_model = kind(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping or getattr(model, "_checkpoint_conversion_mapping", None),
            **kwargs,
        )
        return peft_model
