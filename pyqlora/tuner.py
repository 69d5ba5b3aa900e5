"""LoraModel: a model with LoRA layers put into it, and everything done to all of them at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.auxiliary import ModulesToSaveWrapper, wrap_modules_to_save
from pyqlora.config import LoraConfig, PeftConfig
from pyqlora.encoder import call_layers
from pyqlora.experts import target_stacks
from pyqlora.inject import no_match_error, pattern_value, resolve_targets
from pyqlora.kinds import make_layer
from pyqlora.lora_layer import PREFIX, LoraLayer
from pyqlora.lora_module import LoraModule
from pyqlora.merge_check import checked
from pyqlora.parameters import wrap_parameters
from pyqlora.replicate import replicate_layers
from pyqlora.rows import BASE_ROW, RowAdapters, serving
from pyqlora.targets import Adapted, Wrapper, find_targets, warn_about_experts, warn_about_names, warn_about_targets
from pyqlora.trainable_tokens import TrainableTokensWrapper, wrap_trainable_tokens
from pyqlora.tying import Ties, tie_layers
from pyqlora.unload import unload, untie
from pyqlora.weighted import fill, weighted_config

Mergeable = LoraLayer | TrainableTokensWrapper


class LoraModel(nn.Module):
    """Holds the adapted model as `model`, so that names read `base_model.model.<path>` as in PEFT."""

    prefix = PREFIX
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        known = getattr(model, "peft_config", None)  # of adapters that the model carries already
        self.peft_config: dict[str, PeftConfig] = known if isinstance(known, dict) else {}
        self.peft_config.update(config if isinstance(config, dict) else {adapter_name: config})
        self._active_adapters = [adapter_name]
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.train(model.training)
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        model.peft_config = self.peft_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""
        return self._active_adapters

    @property
    def active_adapter(self) -> list[str]:
        """As active_adapters."""
        return self._active_adapters

    def lora_layers(self) -> Iterator[LoraLayer]:
        """All LoRA layers."""
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    def adapted(self) -> Iterator[Adapted]:
        """All LoRA layers and all modules that are trained whole."""
        return (module for module in self.model.modules() if isinstance(module, Adapted))

    # --- injection ---------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter of that name in peft_config into the model.

        Args:
            model: the model itself.
            adapter_name: a key of peft_config.
            autocast_adapter_dtype: unused here; `cast_adapter` widens half-precision adapters.
            low_cpu_mem_usage: make the adapter on the meta device, for weights that are loaded next.
            state_dict: an adapter's weights, whose keys then say which layers to adapt.

        Raises:
            NoMatchingPeftModuleError: the config selects nothing.
        """
        self._check_new_name(adapter_name)
        config = self.peft_config[adapter_name]
        target_stacks(config, model)
        self._check_new_config(config)
        if config.layer_replication:
            replicate_layers(model, config.layer_replication)
        first = not any(True for _ in self.adapted())
        ties = Ties(config, model)
        resolve_targets(config, model)
        warn_about_experts(config, model)
        targets, excluded, missed = find_targets(config, model, state_dict, ties.targets)
        trainable = [] if first else [p for p in model.parameters() if p.requires_grad]
        for name, module in targets:
            r = pattern_value(config.rank_pattern, name, config.r)
            alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                self._adapt(model, name, module, adapter_name, config, r, alpha)
        if ties.targets:
            tie_layers(model, ties.targets, adapter_name, config, config.r, config.lora_alpha)
        modules = [name for name, _ in targets] + ties.targets[1:]
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            parameters = wrap_parameters(model, config, adapter_name)
        if not modules and not parameters:
            raise no_match_error(config, model, excluded, missed)
        warn_about_targets(config, modules, parameters, excluded or state_dict is not None)
        if modules and state_dict is None:
            warn_about_names(config, model)
        self.targeted_module_names += [name for name in modules if name not in self.targeted_module_names]
        self.targeted_parameter_names += [name for name in parameters if name not in self.targeted_parameter_names]
        active = adapter_name in self.active_adapters
        wrap_modules_to_save(model, config, adapter_name, active, ties.saved)
        wrap_trainable_tokens(model, config, adapter_name, active)
        call_layers(model)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._freeze_base()
        for parameter in trainable:
            parameter.requires_grad_(True)

    def _check_new_name(self, adapter_name: str) -> None:
        if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(f"adapter name {adapter_name!r}: expected one without dots that torch does not use itself")
        if adapter_name in self.prefix:
            warnings.warn(
                f"Adapter name '{adapter_name}' should not be contained in the prefix '{self.prefix}'. Other programs "
                "tell an adapter's keys by that prefix and may not find them.",
                stacklevel=5,
            )

    def _check_new_config(self, config: LoraConfig) -> None:
        if len(self.peft_config) > 1 and sum(other.bias != "none" for other in self.peft_config.values()) > 1:
            raise ValueError(
                "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all "
                "adapters."
            )
        if config.layer_replication and len(self.peft_config) > 1:
            raise ValueError("Cannot add another LoRA adapter when layer replication is used in any of them")
        if config.bias not in ("none", "all", "lora_only"):
            raise NotImplementedError(f"Requested bias: {config.bias}, expected 'none', 'all' or 'lora_only'")
        for name, other in self.peft_config.items():
            given, theirs = (set(c.target_parameters or ()) for c in (config, other))
            if given and theirs and given != theirs:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(given)} for the new adapter and {sorted(theirs)} for adapter "
                    f"'{name}'."
                )

    def _adapt(
        self,
        model: nn.Module,
        name: str,
        module: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        alpha: float,
    ) -> None:
        if isinstance(module, LoraLayer):
            module.update_layer(adapter_name, r, alpha, config)
            return
        layer = make_layer(module, adapter_name, config, r, alpha)
        parent_name, _, child_name = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child_name, layer)

    def _freeze_base(self) -> None:
        """Leave only adapters, modules_to_save and the biases that the active configs name trainable."""
        own = {id(p) for module in self.adapted() for p in module.adapter_parameters()}
        configs = [self.peft_config[name] for name in self.active_adapters if name in self.peft_config]
        biases = {config.bias for config in configs if not config.inference_mode}
        of_layers = (
            {id(getattr(layer, "bias", None)) for layer in self.lora_layers()} if "lora_only" in biases else set()
        )
        for name, parameter in self.model.named_parameters():
            if id(parameter) in own:
                continue
            is_bias = name == "bias" or name.endswith(".bias")
            parameter.requires_grad_(("all" in biases and is_bias) or id(parameter) in of_layers)

    def cast_adapter(self, adapter_name: str) -> None:
        """Keep the adapter's half-precision weights in float32, which small updates need."""
        for layer in self.lora_layers():
            for parameter in layer.adapter_parameters(adapter_name):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()

    # --- which adapters run ------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use one adapter or several at once; train them, and no others, unless `inference_mode`."""
        for module in self.adapted():
            if isinstance(module, Mergeable) and module.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                )
                module.unmerge()
            module.set_adapter(adapter_name, inference_mode=inference_mode)
        self._active_adapters = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, active or not."""
        for module in self.adapted():
            module.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Run with the active adapters again."""
        for module in self.adapted():
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Run as the base model; biases trained with bias="all" or "lora_only" stay as they are, with a warning."""
        for name in self.active_adapters:
            bias = self.peft_config[name].bias
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    stacklevel=2,
                )
        for module in self.adapted():
            module.enable_adapters(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if any(adapter_name in layer.merged_adapters for layer in self.lora_layers()):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        active: list[str] | None = None
        for layer in self.lora_layers():
            layer.delete_adapter(adapter_name)
            active = layer.active_adapters if active is None else active
        for module in self.adapted():
            if isinstance(module, Wrapper):
                module.delete_adapter(adapter_name, active)
        self._active_adapters = list(active or [])

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others, each with a weight that may be negative; frozen until it is set.

        Args:
            adapters: the adapters to combine.
            weights: one for each.
            adapter_name: the new one's name; if it exists nothing is done.
            combination_type: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune" combine A and B apart;
                these with "_svd", and "svd", combine the updates and factor the result; "cat" is exact.
            svd_rank: rank after factoring; default the largest of the adapters.
            svd_clamp: quantile of the factors' values above which they are cut.
            svd_full_matrices: see torch.linalg.svd.
            svd_driver: see torch.linalg.svd.
            density: share of values to keep in ties, dare and magnitude_prune.
            majority_sign_method: "total" or "frequency", how ties finds the majority's sign.

        Raises:
            ValueError: an unknown adapter or type, ranks, targets or modules_to_save that do not go together.
        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ValueError(f"add_weighted_adapter: {len(adapters)} adapters but {len(weights)} weights")
        kind = "linear" if len(adapters) == 1 else combination_type
        config = weighted_config(self.peft_config, adapters, kind, svd_rank)
        wrappers = [module for module in self.adapted() if isinstance(module, ModulesToSaveWrapper)]
        if clashes := [wrapper for wrapper in wrappers if len(wrapper.adapters() & set(adapters)) > 1]:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{len(clashes)} such instance(s)."
            )
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        svd = {"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver}
        for layer in self.lora_layers():
            if adapter_name in layer.adapters():
                chosen = dict(zip(adapters, weights, strict=True))
                fill(layer, adapter_name, chosen, kind, density, majority_sign_method, svd)

    @contextmanager
    def rows(self, adapter_names: list[str] | None, beams: int | None = None) -> Iterator[None]:
        """While open, every row of a batch runs with its own adapter; `__base__` names rows without one.

        Raises:
            ValueError: in training mode, for a name that is no adapter, or with a program's own kind of layer.
        """
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := sorted(set(adapter_names) - {BASE_ROW, *self.peft_config}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        own = {kind for config in self.peft_config.values() for kind in config._custom_modules.values()}
        if custom := sorted(kind.__name__ for kind in own if not issubclass(kind, LoraModule)):
            raise ValueError(f"Cannot pass `adapter_names` to a model with custom layers: {', '.join(custom)}")
        with serving(RowAdapters(list(adapter_names), beams or 1)):
            yield

    # --- merging -----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Add the updates of adapters (default: the active ones) to the base weights; see LoraLayer.merge.

        Raises:
            ValueError: two of the adapters train the same token.
        """
        tokens = [module for module in self.adapted() if isinstance(module, TrainableTokensWrapper)]
        for wrapper in tokens:
            wrapper.check_merge(adapter_names)
        untie(self.model)
        for wrapper in tokens:
            wrapper.merge(adapter_names)
        for layer in self.lora_layers():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, requantize=requantize)

    def unmerge_adapter(self) -> None:
        """Take merged updates out of the base weights again."""
        for module in self.adapted():
            if isinstance(module, LoraLayer) or (isinstance(module, TrainableTokensWrapper) and module.merged):
                module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Merge adapters for good and return the model without any LoRA layer.

        A model with 4-bit layers becomes one of plain layers in the original dtype, adapted or not, which saves and
        loads without pyqlora; with `requantize` the 4-bit layers stay 4-bit ones. Where the 4-bit model's tokenizer is
        at hand, a line on stderr says how far the result is from the unmerged model on a few prompts.
        """
        for module in self.adapted():
            if isinstance(module, TrainableTokensWrapper):
                module.check_merge(adapter_names)
        with checked(self, adapter_names):
            untie(self.model)
            return unload(self.model, True, progressbar, safe_merge, adapter_names, requantize)

    def unload(self) -> nn.Module:
        """Return the base model as it was, without any LoRA layer."""
        for module in self.adapted():
            if isinstance(module, Mergeable) and module.merged:
                module.unmerge()
        return unload(self.model, False)
