"""The LoRA layers of the kinds of base layer that have a weight of their own: linear, embedding, convolution."""

# ruff: noqa: D102 - LoraModule says what the methods do

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.config import LoraConfig
from pyqlora.lora_module import LoraModule
from pyqlora.nn.linear4bit import Linear4bit
from pyqlora.ops.lora_linear import lora_linear
from pyqlora.ops.lora_rows import lora_rows
from pyqlora.plans import Plan, plans
from pyqlora.rows import served_rows
from pyqlora.variants import init_embedding


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody sees the layer's call: hooks, or another forward over its own (accelerate moves weights so)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__


class Linear(LoraModule):
    """LoRA on a linear layer: nn.Linear, Linear4bit or transformers' Conv1D."""

    def base_features(self) -> tuple[int, int]:
        return tuple(self.get_base_layer().weight.shape) if self.fan_in_fan_out else super().base_features()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = plans()
        plan = None if kept is None or args or kwargs else kept.get(self)
        if plan is not None and plan.holds(self, x):
            return plan.call(x)
        base = self._modules["base_layer"]
        plain = isinstance(base, Linear4bit) and not (args or kwargs or served_rows())
        names = self.updating() if plain and not is_watched(base) else ()
        if len(names) == 1 and not (self.use_dora[names[0]] or self.lora_bias[names[0]]):
            a, b, scaling = self.factors_and_scaling(names[0])
            dropout = self.dropout_of(names[0])
            if kept is not None and not dropout and (call := base.prepared_with_update(x, a, b, scaling)):
                kept[self] = Plan(self, names[0], x, call)
                return call(x)
            result = base.forward_with_update(x, a, b, scaling, dropout)
            if result is not None:
                return result
        return super().forward(x, *args, **kwargs)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        # As lora_A[name].weight, without the four lookups by __getattr__ that would take longer than a small product.
        modules = self._modules
        a, b = modules["lora_A"]._modules[name]._parameters, modules["lora_B"]._modules[name]._parameters
        try:
            return a["weight"], b["weight"]
        except KeyError:  # parametrized
            return super().factors(name)

    def factors_and_scaling(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A, B and the factor of their product."""
        (a, b), scaling = self.factors(name), self.scaling[name]
        if isinstance(scaling, Tensor):  # made ready for hot swapping in a compiled model
            return a, b * scaling, 1.0
        return a, b, scaling

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        a, b, scaling = self.factors_and_scaling(name)
        owned = not self.base_layer._forward_hooks  # a hook may have kept the output, which then must stay as it is
        result = lora_linear(result, x, a, b, scaling, self.dropout_of(name), inplace=owned)
        if self.lora_bias[name]:
            result = result + (self.lora_B[name].bias * self.scaling[name]).to(result.dtype)
        return result

    def update_rows(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """All adapters in one pass."""
        used = sorted(set(names) & self.adapters())
        if not used or any(self.dropout_of(name) or self.lora_bias[name] for name in used):
            return super().update_rows(names, x, result)
        a, b, scalings = map(list, zip(*(self.factors_and_scaling(name) for name in used), strict=True))
        return lora_rows(result, x, a, b, scalings, [used.index(name) if name in used else -1 for name in names])


class Embedding(LoraModule):
    """LoRA on nn.Embedding: A holds a column for each row of the table."""

    def base_features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")
        self.lora_embedding_A[name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.out_features, r))

    def initialise(self, name: str, config: LoraConfig) -> None:
        if config.init_lora_weights:  # whatever it names: the other ways are for matrices that multiply
            init_embedding(self, name, config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def delta_matrix(self, name: str) -> Tensor:
        a, b = self.factors(name)
        return (b.float() @ a.float()).t()

    def feature_rows(self, weight: Tensor) -> Tensor:
        return weight.t()

    def along_features(self, values: Tensor) -> Tensor:
        return values

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        return (result + self.looked_up(name, x)).to(result.dtype)

    def looked_up(self, name: str, x: Tensor) -> Tensor:
        """The adapter's scaled vectors of the tokens x."""
        base = self.get_base_layer()
        a, b = self.factors(name)
        rows = nn.functional.embedding(
            x,
            a.t(),
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        scale = getattr(base, "embed_scale", None)  # Gemma's embedding multiplies what it looks up
        update = rows @ b.t() * self.scaling[name]
        return update if scale is None else update * torch.as_tensor(scale, device=update.device).to(update.dtype)


class ConvNd(LoraModule):
    """LoRA on a convolution: A is a convolution to r channels with the base's kernel, B one of size 1."""

    def base_features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.in_channels, base.out_channels

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                "not target this specific layer."
            )
        if base.groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=2)
        kind, one = type(base), (1,) * len(base.kernel_size)
        self.lora_A[name] = kind(self.in_features, r, base.kernel_size, base.stride, base.padding, bias=False)
        self.lora_B[name] = kind(r, self.out_features, one, one, groups=base.groups, bias=config.lora_bias)

    def initialise(self, name: str, config: LoraConfig) -> None:
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"Unknown initialization init_lora_weights={config.init_lora_weights!r} for a convolution: expected "
                "True, False or 'gaussian'"
            )
        super().initialise(name, config)

    def delta_matrix(self, name: str) -> Tensor:
        if self.get_base_layer().groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        a, b = (factor.float() for factor in self.factors(name))
        return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])

    def norm_update(self, name: str) -> Tensor:
        """What DoRA's norm adds to the base weight, in its shape.

        With groups it is no part of the layer's update, whose A sees the inputs of all groups: PEFT lays the product
        out so, and an adapter computes the same here only if this does so too.
        """
        a, b = (factor.float() for factor in self.factors(name))
        product = b.reshape(-1, len(a)) @ a.flatten(1)
        return product.view(self.get_base_layer().weight.shape) * self.scaling[name]

    def norm_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *(1,) * len(self.get_base_layer().kernel_size))

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        return (result + self.convolved(name, x)).to(result.dtype)

    def convolved(self, name: str, x: Tensor) -> Tensor:
        """The adapter's scaled output for x."""
        if self.cast_input_dtype_enabled:
            x = x.to(self.factors(name)[0].dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]


class Conv1d(ConvNd):
    """LoRA on nn.Conv1d."""


class Conv2d(ConvNd):
    """LoRA on nn.Conv2d."""


class Conv3d(ConvNd):
    """LoRA on nn.Conv3d."""
