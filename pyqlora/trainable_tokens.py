"""trainable_token_indices: train single rows of an embedding, e.g. those of new tokens, and store only them.

Keys in memory are `<path>.token_adapter.trainable_tokens_delta.<adapter>` [tokens, dim], in a file without the adapter.
A tied output head runs with the same rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.auxiliary import raise_inside_lora
from pyqlora.config import LoraConfig
from pyqlora.lora_layer import LoraLayer
from pyqlora.rows import BASE_ROW, names_of_rows
from pyqlora.ties import tied_names


class TrainableTokens(nn.Module):
    """The wrapped embedding (or tied linear head) and each adapter's rows for it."""

    def __init__(self, base_layer: nn.Module, tied_to: TrainableTokens | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.tied = tied_to is not None
        self.active_adapters: list[str] = []
        self.trainable_tokens_delta = tied_to.trainable_tokens_delta if tied_to else nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = tied_to.token_indices if tied_to else {}
        # The rows that the base weight had before an adapter was merged; a tied head reads the same weight.
        self.replaced: dict[str, Tensor] = tied_to.replaced if tied_to else {}

    def add(self, name: str, indices: list[int]) -> None:
        """Start an adapter's rows from those of the base layer."""
        if name not in self.token_indices:
            self.token_indices[name] = list(indices)
            self.trainable_tokens_delta[name] = nn.Parameter(self.base_layer.weight.detach()[list(indices)].clone())

    def forward(self, x: Tensor, names: Iterable[str] = ()) -> Tensor:
        """The base layer's output with the rows (of a head: the columns) of these adapters in place of its own."""
        result = self.base_layer(x)
        for name in names:
            rows = self.trainable_tokens_delta[name]
            indices = torch.tensor(self.token_indices[name], device=x.device)
            if isinstance(self.base_layer, nn.Embedding):
                result = self._replace_rows(x, result, rows, indices)
            else:
                columns = nn.functional.linear(x, rows.to(x.dtype)).to(result.dtype)
                result = result.index_copy(result.dim() - 1, indices, columns)
        return result

    def _replace_rows(self, x: Tensor, result: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        ordered, order = indices.sort()
        place = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        hit = ordered[place] == x
        scale = getattr(self.base_layer, "embed_scale", None)
        chosen = rows[order[place[hit]]]
        if scale is not None:
            chosen = chosen * torch.as_tensor(scale, device=rows.device).to(rows.dtype)
        return result.index_put((hit,), chosen.to(result.dtype))

    @torch.no_grad()
    def write(self, names: Iterable[str]) -> None:
        """Put the rows of these adapters into the base weight."""
        for name in names:
            weight = self.base_layer.weight
            weight.data[self.token_indices[name]] = self.trainable_tokens_delta[name].to(weight.dtype)

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """As `write`, keeping what was there."""
        for name in names:
            self.replaced[name] = self.base_layer.weight.detach()[self.token_indices[name]].clone()
            self.write([name])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight's own rows back."""
        for name, rows in self.replaced.items():
            self.base_layer.weight.data[self.token_indices[name]] = rows
        self.replaced.clear()


class TrainableTokensWrapper(nn.Module):
    """Stands in for an embedding or a tied head and runs it with the active adapters' rows."""

    def __init__(self, module: nn.Module, tied_to: TrainableTokensWrapper | None = None):
        super().__init__()
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            raise TypeError(f"trainable_token_indices cannot be applied to modules of type {type(module)}")
        self.token_adapter = TrainableTokens(module, tied_to.token_adapter if tied_to else None)
        self._disable_adapters = False

    @property
    def active_adapters(self) -> list[str]:
        """The adapters whose rows are used."""
        return self.token_adapter.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the base layer's own rows are used whatever is active."""
        return self._disable_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose rows the base weight holds."""
        return list(self.token_adapter.replaced)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds any adapter's rows."""
        return bool(self.token_adapter.replaced)

    @property
    def original_module(self) -> nn.Module:
        """The wrapped layer."""
        return self.token_adapter.base_layer

    @property
    def weight(self) -> Tensor:
        """The base weight with the active rows in it: a copy."""
        weight = self.original_module.weight
        if self._disable_adapters or self.merged:
            return weight
        for name in self.token_adapter.active_adapters:
            indices = torch.tensor(self.token_adapter.token_indices[name], device=weight.device)
            weight = weight.index_copy(0, indices, self.token_adapter.trainable_tokens_delta[name].to(weight.dtype))
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "token_adapter" not in self._modules:
                raise
            return getattr(self.original_module, name)

    def adapters(self) -> set[str]:
        """Names of the adapters that have rows here."""
        return set(self.token_adapter.token_indices)

    def adapter_parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The rows of one adapter, or of all."""
        return [rows for key, rows in self.token_adapter.trainable_tokens_delta.items() if name in (None, key)]

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters' rows; with adapter_names, with those of each row's adapter."""
        names = names_of_rows(len(x), kwargs.get("adapter_names"))
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters:
            return self.token_adapter(x)
        if names is None:
            return self.token_adapter(x, () if self.merged else self.token_adapter.active_adapters)
        rows: list[Any] = [None] * len(names)
        for name in dict.fromkeys(names):
            chosen = [i for i, other in enumerate(names) if other == name]
            own = [] if name == BASE_ROW or name not in self.adapters() else [name]
            for i, row in zip(chosen, self.token_adapter(x[chosen], own), strict=True):
                rows[i] = row
        return torch.stack(rows)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use and train the rows of those of the adapters that have some.

        Raises:
            ValueError: two of them train the same token.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [name for name in names if name in self.adapters()]
        self._check_disjunct(mine, f"Only one adapter can be set at a time for {type(self).__name__}: ")
        self.token_adapter.active_adapters = mine
        for name in self.adapters():
            self.set_requires_grad(name, name in mine and not inference_mode)

    def _check_disjunct(self, names: Iterable[str], what: str = "") -> None:
        seen: set[int] = set()
        for name in names:
            if seen & set(self.token_adapter.token_indices[name]):
                raise ValueError(
                    f"{what}Token indices of adapter {name} are already defined and would result in undefined merging "
                    "behavior. Only disjunct token indices are currently supported."
                )
            seen |= set(self.token_adapter.token_indices[name])

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.token_adapter.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.adapters() and name not in self.token_adapter.replaced]

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError if two of these adapters (default: the active ones) and the merged train the same token."""
        self._check_disjunct([*self.merged_adapters, *self._to_merge(adapter_names)])

    def merge(self, adapter_names: list[str] | None = None) -> None:
        """Put the rows of these adapters (default: the active ones) into the base weight; those of a tied head's too.

        Raises:
            ValueError: see check_merge.
        """
        self.check_merge(adapter_names)
        self.token_adapter.merge(self._to_merge(adapter_names))

    def unmerge(self) -> None:
        """Put the base weight's own rows back."""
        self.token_adapter.unmerge()

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze the adapters' rows."""
        for name in {adapter_names} if isinstance(adapter_names, str) else set(adapter_names):
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active rows, or the base layer's own; rows are frozen while disabled."""
        if enabled and self._disable_adapters:
            self.set_requires_grad(self.token_adapter.active_adapters, True)
        elif not enabled:
            self.set_requires_grad(self.adapters(), False)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter's rows."""
        if adapter_name in self.adapters():
            del self.token_adapter.token_indices[adapter_name]
            del self.token_adapter.trainable_tokens_delta[adapter_name]
        self.set_adapter(new_active_adapters or [])

    def key_map(self, adapter_name: str) -> dict[str, str]:
        """File key -> key in memory, relative to this module; none for a tied head, which has no rows of its own."""
        key = "token_adapter.trainable_tokens_delta"
        owned = adapter_name in self.adapters() and not self.token_adapter.tied
        return {key: f"{key}.{adapter_name}"} if owned else {}

    def unloaded(self, merge: bool, adapter_names: list[str] | None = None) -> nn.Module:
        """The wrapped layer; if merging, with the rows of these adapters (default: the active ones) in it."""
        if merge:
            names = self.token_adapter.active_adapters if adapter_names is None else adapter_names
            self.token_adapter.write(name for name in names if name in self.adapters())
        return self.original_module


def wrap_trainable_tokens(model: nn.Module, config: LoraConfig, adapter_name: str, active: bool) -> None:
    """Give the adapter its rows of the embeddings that trainable_token_indices names, and of a head tied to them.

    Raises:
        ValueError: no such layer, or one that modules_to_save trains whole.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(wanted, dict):
        paths = [path for path, module in model.named_modules() if module is embedding and embedding is not None]
        wanted = {paths[0] if paths else "embed_tokens": wanted}
    tied = [path for path in tied_names(model) if embedding is not None]
    rows: dict[str, list[int]] = {}
    for name, indices in wanted.items():
        if name in (config.modules_to_save or ()):
            raise ValueError(
                f"The embedding layer is already marked to be trained fully, either specify "
                f"`modules_to_save=[..., \"{name}\", ...]` or `trainable_tokens={{'{name}': x}}` but not both."
            )
        found = [path for path, _ in model.named_modules() if path.endswith(name)]
        if not found:
            raise ValueError(
                f"Target modules {{{name!r}}} not found in the base model. Please check trainable_token_indices."
            )
        rows.update({path: list(indices) for path in found})
    own = [path for path, module in model.named_modules() if module is embedding and embedding is not None]
    shared = [path for path in tied if own and rows.get(path, rows.get(own[0])) == rows.get(own[0])]
    if config.ensure_weight_tying and shared != tied:
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for the embedding and the layers "
            f"tied to it: { ({path: rows.get(path) for path in [*own, *tied]}) }"
        )
    for path, indices in rows.items():
        if path not in shared or path in own:
            _wrap(model, path, None, adapter_name, indices, active, config)
    wrapper = model.get_input_embeddings() if embedding is not None else None
    if isinstance(wrapper, TrainableTokensWrapper):
        for path in shared:
            if path not in own:
                _wrap(model, path, wrapper, adapter_name, [], active, config)
    if config.ensure_weight_tying and not tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=6,
        )


def _wrap(
    model: nn.Module,
    path: str,
    tied_to: TrainableTokensWrapper | None,
    adapter_name: str,
    indices: list[int],
    active: bool,
    config: LoraConfig,
) -> None:
    module = model.get_submodule(path)
    around = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    if isinstance(around, LoraLayer):
        raise_inside_lora(TrainableTokensWrapper, around, adapter_name)
    if isinstance(module, LoraLayer):
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {type(module)}: {path} has a LoRA adapter; "
            "train either its rows or LoRA"
        )
    if not isinstance(module, TrainableTokensWrapper):
        parent, _, child = path.rpartition(".")
        module = TrainableTokensWrapper(module, tied_to)
        setattr(model.get_submodule(parent), child, module)
    if tied_to is None:
        module.token_adapter.add(adapter_name, indices)
    module.original_module.requires_grad_(False)
    module.set_adapter(adapter_name if active else module.active_adapters, config.inference_mode)
