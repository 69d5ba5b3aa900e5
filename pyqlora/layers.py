"""The LoRA layers of the kinds of base layer that have a weight of their own: linear, embedding, convolution."""

# ruff: noqa: D102 - LoraLayer says what the methods do

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from pyqlora.config import LoraConfig
from pyqlora.lora_layer import LoraLayer
from pyqlora.ops.lora_linear import compute_dtype, lora_linear
from pyqlora.variants import init_embedding


class Linear(LoraLayer):
    """LoRA on a linear layer: nn.Linear, Linear4bit or transformers' Conv1D."""

    def base_features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        if hasattr(base, "in_features"):
            return base.in_features, base.out_features
        return tuple(base.weight.shape)  # Conv1D stores [in, out]

    def make_factors(self, name: str, r: int, config: LoraConfig) -> None:
        # nn.Linear's own initialisation is overwritten, but it draws random numbers as PEFT does: same seed, same A.
        self.lora_A[name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        a, b = self.factors(name)
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor):  # made ready for hot swapping in a compiled model
            b, scaling = b * scaling, 1.0
        owned = not self.base_layer._forward_hooks  # a hook may have kept the output, which then must stay as it is
        result = lora_linear(result, x, a, b, scaling, self.dropout_of(name), inplace=owned)
        if self.lora_bias[name]:
            result = result + (self.lora_B[name].bias * self.scaling[name]).to(result.dtype)
        return result

    def update_rows(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """All adapters in two batched products: rank-padded A and B are gathered for each row."""
        used = sorted(set(names) & self.adapters())
        if not used or any(self.dropout_of(name) or self.lora_bias[name] for name in used):
            return super().update_rows(names, x, result)
        r = max(self.r[name] for name in used)
        dtype = compute_dtype(x, self.factors(used[0])[0])
        a = x.new_zeros((len(used) + 1, r, self.in_features), dtype=dtype)
        b = x.new_zeros((len(used) + 1, self.out_features, r), dtype=dtype)
        for i, name in enumerate(used):  # the last one stays zero: rows without an adapter
            a[i, : self.r[name]] = self.factors(name)[0]
            b[i, :, : self.r[name]] = self.factors(name)[1] * self.scaling[name]
        chosen = torch.tensor([used.index(name) if name in used else len(used) for name in names], device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            h = torch.bmm(x.reshape(len(x), -1, self.in_features).to(dtype), a[chosen].mT)
            rows = result.reshape(len(x), -1, self.out_features).to(dtype)
            return torch.baddbmm(rows, h, b[chosen].mT).to(result.dtype).view(result.shape)


class Embedding(LoraLayer):
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


class ConvNd(LoraLayer):
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

    def norm_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *(1,) * len(self.get_base_layer().kernel_size))

    def update(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        return (result + self.convolved(name, x)).to(result.dtype)

    def convolved(self, name: str, x: Tensor) -> Tensor:
        """The adapter's scaled output for x."""
        x = x.to(self.factors(name)[0].dtype)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]


class Conv1d(ConvNd):
    """LoRA on nn.Conv1d."""


class Conv2d(ConvNd):
    """LoRA on nn.Conv2d."""


class Conv3d(ConvNd):
    """LoRA on nn.Conv3d."""
