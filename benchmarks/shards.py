"""A checkpoint of any size, in bfloat16 shards with random weights, written without holding more than one shard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
SHARD_BYTES = 500 << 20


def write_shards(path: Path, sizes: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """A Llama of these sizes in a directory, unless it holds a model already; the files are on the disk then."""
    if (path / "config.json").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards, room = [], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    generator = torch.Generator().manual_seed(0)
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _weight(shapes[name], generator) for name in names}, path / file, {"format": "pt"})
        with open(path / file, "rb") as written:
            os.fsync(written.fileno())
        files |= dict.fromkeys(names, file)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(path)  # the last file: a directory with a config is complete


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for rows in weight.split(max(1, (16 << 20) // shape[1])):
        rows.copy_(torch.empty(rows.shape).normal_(0, 0.02, generator=generator))
    return weight
