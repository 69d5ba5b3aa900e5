"""LoRA on nn.MultiheadAttention."""

# ruff: noqa: D102 - LoraModule says what the methods do

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from pyqlora import dense
from pyqlora.config import LoraConfig
from pyqlora.layers import Linear
from pyqlora.rows import served_rows


class OutProjection(Linear):
    """LoRA on the output projection, whose update counts twice.

    PEFT adds it twice, in the forward pass and in merging, the second time out of autograd's sight: an adapter computes
    and trains the same here only if this does so too.
    """

    def scaled_update(self, name: str) -> Tensor:
        update = super().scaled_update(name)
        return update + update.detach()


class MultiheadAttention(Linear):
    """LoRA on the joint projection to queries, keys and values, and a LoRA layer of its own on the output projection.

    torch's attention reads the weights of both and never calls their modules, so it runs with W + sBA in their place.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: float):
        kind = type(self).__name__
        if not base_layer._qkv_same_embed_dim:
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {kind}.")
        if config.use_dora:
            raise ValueError(f"{kind} does not support DoRA (yet), please set use_dora to False")
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {kind}.")
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} has no effect on {kind}, whose update is added to the weight",
                stacklevel=5,
            )
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {kind}.")
        base_layer.out_proj = OutProjection(base_layer.out_proj, adapter_name, config, r, lora_alpha)
        super().__init__(base_layer, adapter_name, config, r, lora_alpha)

    def base_features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.embed_dim, 3 * base.embed_dim

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        self.base_layer.out_proj.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def adapted_weight(self) -> Tensor:
        return self.get_base_layer().in_proj_weight

    def read_weight(self) -> Tensor | None:
        return dense.widened(self.adapted_weight())

    def write_weight(self, weight: Tensor) -> None:
        self.adapted_weight().data = weight.to(self.adapted_weight().dtype, copy=True)

    @property
    def out_proj(self) -> nn.Module:
        """The base layer's output projection."""
        return self.get_base_layer().out_proj.get_base_layer()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.get_base_layer(), name)

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The base layer's (output, attention weights), in the query's dtype."""
        if kwargs.pop("adapter_names", None) is not None or served_rows() is not None:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")
        projection = self.get_base_layer().out_proj
        for layer in (self, projection):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        base = dense.with_values(self.get_base_layer(), {"in_proj_weight": self.weight_with_updates()})
        weight = {"weight": projection.weight_with_updates()}
        base._modules = {**base._modules, "out_proj": dense.with_values(projection.get_base_layer(), weight)}
        output, weights = base(query, *args, **kwargs)
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)
