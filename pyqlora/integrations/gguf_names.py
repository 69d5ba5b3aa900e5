"""What a GGUF architecture calls things, and how its tensors differ from those of transformers.

One row for each architecture. llama.cpp turns neighbouring rows of a llama's query and key weights into a rotation
(x0 y0 x1 y1 …) where transformers pairs the halves (x0 x1 … y0 y1 …); Gemma's norms multiply by 1 + w, of which GGUF
stores the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# GGUF's names for the tensors of a decoder block, and transformers'.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH_NAMES = BLOCK_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        model_types: transformers' model types that are written as it; the first is what it is read as.
        blocks: names of a block's tensors.
        rotated: whether query and key rows are in llama.cpp's order.
        norm_offset: what GGUF adds to the weights of norms.
        activation: of the feed-forward layers.
        scalar_layers: number of layers of the one size whose attention is scaled by hidden size / heads (Gemma), which
            GGUF does not say.
    """

    model_types: tuple[str, ...]
    blocks: dict[str, str] = field(default_factory=lambda: BLOCK_NAMES)
    rotated: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    scalar_layers: int | None = None

    def query_scalar(self, layers: int, heads: int, hidden: int, head_dim: int) -> int:
        """Gemma's query_pre_attn_scalar, by the rule that llama.cpp has."""
        return hidden // heads if layers == self.scalar_layers else head_dim

    def from_gguf(self, name: str, value: Tensor, config: Any) -> Tensor:
        """The tensor of GGUF's name as transformers has it."""
        if heads := self._heads(name, config):  # pairs to halves
            return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        return value - self.norm_offset if name.endswith("norm.weight") else value

    def to_gguf(self, name: str, value: Tensor, config: Any) -> Tensor:
        """The inverse of `from_gguf`."""
        if heads := self._heads(name, config):
            return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        return value + self.norm_offset if name.endswith("norm.weight") else value

    def _heads(self, name: str, config: Any) -> int:
        """Heads whose rows are rotated in the tensor, 0 if none are."""
        part = name.split(".")[2:3]
        if not self.rotated or part not in (["attn_q"], ["attn_k"]):
            return 0
        return config.num_attention_heads if part == ["attn_q"] else config.num_key_value_heads


_GEMMA = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral"), rotated=True),
    "qwen2": Architecture(("qwen2",)),
    "qwen3": Architecture(("qwen3",)),
    "gemma": Architecture(("gemma",), **_GEMMA),
    "gemma2": Architecture(("gemma2",), SANDWICH_NAMES, scalar_layers=46, **_GEMMA),
    "gemma3": Architecture(("gemma3_text",), SANDWICH_NAMES, scalar_layers=62, **_GEMMA),
}


def transformers_name(name: str, architecture: str = "llama") -> str | None:
    """Where the GGUF tensor `name` belongs in the transformers model; None if it has no counterpart.

    Raises:
        ValueError: a name that is not known.
    """
    if name == "rope_freqs.weight":
        return None
    parts = name.split(".")
    blocks = ARCHITECTURES[architecture].blocks
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in blocks:
        return f"model.layers.{parts[1]}.{blocks[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OUTER_NAMES:
        return f"{OUTER_NAMES[parts[0]]}.{parts[1]}"
    raise ValueError(f"GGUF tensor {name} has no known place in a transformers model")


def gguf_name(name: str, architecture: str) -> str:
    """The GGUF tensor for a parameter of the transformers model.

    Raises:
        ValueError: GGUF has no tensor for it.
    """
    path, _, leaf = name.rpartition(".")
    for ours, theirs in OUTER_NAMES.items():
        if path == theirs:
            return f"{ours}.{leaf}"
    if path.startswith("model.layers."):
        index, _, part = path.removeprefix("model.layers.").partition(".")
        for ours, theirs in ARCHITECTURES[architecture].blocks.items():
            if part == theirs:
                return f"blk.{index}.{ours}.{leaf}"
    raise ValueError(f"{name}: the GGUF architecture {architecture} has no tensor for this")


def architecture_of(config: Any) -> str:
    """The GGUF architecture that a transformers config is written as.

    Raises:
        ValueError: there is none.
    """
    for name, row in ARCHITECTURES.items():
        if config.model_type in row.model_types:
            return name
    known = ", ".join(kind for row in ARCHITECTURES.values() for kind in row.model_types)
    raise ValueError(f"a {config.model_type} model cannot be written as GGUF here, expected one of {known}")
