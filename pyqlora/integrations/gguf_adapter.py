"""LoRA adapters as GGUF files in llama.cpp's format, and back.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha
    <tensor>.lora_a [r, in] and <tensor>.lora_b [out, r] for each adapted <tensor> of the base model, in float32

llama.cpp scales every update by alpha / r with one alpha and the rank of the tensors, so a scale that differs between
layers is multiplied into B.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from pyqlora.adapter_files import PREFIX, load_peft_weights
from pyqlora.config import LoraConfig, PeftConfig
from pyqlora.finetune.files import whole_file
from pyqlora.inject import pattern_value
from pyqlora.integrations.gguf import GGUFFile
from pyqlora.integrations.gguf_names import ARCHITECTURES, architecture_of, gguf_name, transformers_name
from pyqlora.variants import scaling_factor

PARTS = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}


def write_adapter(adapter: str | os.PathLike, base_config: Any, path: str | Path) -> None:
    """Write a saved adapter as a GGUF file for llama.cpp.

    Args:
        adapter: its directory.
        base_config: the transformers config of its base model.
        path: the file.

    Raises:
        ValueError: something in it that the format has no place for: DoRA, biases, embeddings, whole modules.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    architecture = architecture_of(base_config)
    if config.use_dora:
        raise ValueError(f"{adapter}: use_dora: GGUF adapters are plain LoRA; merge it into its model instead")
    alpha, factors = _scales(config, weights := load_peft_weights(str(adapter)))
    tensors = {}
    for key, value in weights.items():
        base, part = _parts(key)
        if part is None:
            raise ValueError(f"{adapter}: {key} has no place in a GGUF adapter; merge it into its model instead")
        name = gguf_name(f"{base}.weight", architecture)
        value = value.float()
        if part == ".lora_b":
            value = ARCHITECTURES[architecture].to_gguf(name, value * factors[base], base_config)
        tensors[name + part] = value.contiguous()
    with whole_file(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, value in tensors.items():
            writer.add_tensor(name, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_adapter(path: str | Path, base_config: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the weights, under the keys of PEFT's files, of a GGUF adapter.

    Args:
        path: the file.
        base_config: the transformers config of its base model.

    Raises:
        ValueError: no GGUF file, no LoRA adapter, or one for a model of another architecture.
    """
    file = GGUFFile(path)
    architecture = architecture_of(base_config)
    kind = (file.metadata.get("general.type"), file.metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise ValueError(f"{path}: expected a LoRA adapter, got a GGUF file of type {kind[0]!r}, adapter {kind[1]!r}")
    own = file.metadata.get("general.architecture")
    if own != architecture:
        raise ValueError(f"{path}: this adapter is for a {own} model, and the base model is a {architecture}")
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for tensor in file.tensors:
        name, _, part = tensor.rpartition(".")
        value = file.read(tensor)
        module = transformers_name(name, architecture).removesuffix(".weight")
        if part == "lora_a":
            ranks[module] = len(value)
        else:
            value = ARCHITECTURES[architecture].from_gguf(name, value, base_config)
        weights[f"{PREFIX}{module}.lora_{part[-1].upper()}.weight"] = value
    r = max(ranks.values())
    alpha = file.metadata["adapter.lora.alpha"]
    alpha = int(alpha) if alpha == int(alpha) else alpha
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=sorted(ranks), rank_pattern=others, task_type="CAUSAL_LM")
    return config, weights


def _parts(key: str) -> tuple[str, str | None]:
    """The adapted module and GGUF's suffix for a key of PEFT's file; None for a key that is neither A nor B."""
    for ending, part in PARTS.items():
        if key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending), part
    return key, None


def _scales(config: LoraConfig, weights: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The alpha of the file, and for each module what B is multiplied by to be scaled as configured."""
    wanted = {}
    for key, value in weights.items():
        module, part = _parts(key)
        if part == ".lora_a":
            alpha = pattern_value(config.alpha_pattern, module, config.lora_alpha)
            wanted[module] = scaling_factor(alpha, len(value), config.use_rslora) * len(value)  # an alpha of its own
    alpha = float(torch.tensor(next(iter(wanted.values()), config.lora_alpha), dtype=torch.float32))
    return alpha, {module: own / alpha for module, own in wanted.items()}
