"""Models small enough to build in every test."""

from __future__ import annotations

import torch
from torch import nn

from pyqlora.nn import Linear4bit


class Mlp(nn.Module):
    """Two linear layers and a head, of odd sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(11, 23, bias=bias, dtype=dtype)
        self.down = nn.Linear(23, 11, bias=bias, dtype=dtype)
        self.norm = nn.LayerNorm(11, dtype=dtype)
        self.head = nn.Linear(11, 5, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> Mlp:
    torch.manual_seed(0)
    return Mlp(dtype, bias)


def mlp_4bit(dtype: torch.dtype = torch.float32) -> Mlp:
    model = mlp(dtype)
    for name in ("up", "down"):
        dense = getattr(model, name)
        layer = Linear4bit(dense.in_features, dense.out_features, quant_type="nf4", compute_dtype=dtype)
        layer.load_state_dict(dense.state_dict())
        layer.weight.data = layer.weight.data.to(dtype)
        layer.bias.data = layer.bias.data.to(dtype)
        setattr(model, name, layer.to("cpu"))
    return model


def llama(dtype: torch.dtype = torch.float32, **changes):
    """A random Llama of two blocks; transformers must be installed."""
    return causal_lm("Llama", dtype, **changes)


def causal_lm(name: str, dtype: torch.dtype = torch.float32, **changes):
    """A random model of two blocks, of the architecture that transformers calls so."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give every trainable parameter a value that matters, the same for equal names and shapes."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name.rpartition("layers.")[2])))
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise.to(parameter))
