"""transformers models as GGUF files: f16, or q8_0 where rows are whole blocks of 32; norms and biases in float32.

Tensors go to the file one by one, so writing needs the model and one tensor. The encoding of blocks and the file's
layout are the gguf package's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pyqlora.finetune.files import whole_file
from pyqlora.integrations.gguf_names import ARCHITECTURES, architecture_of, gguf_name
from pyqlora.integrations.gguf_tokenizer import write_tokenizer

F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
KINDS = {"f16": (F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
Q8_0_BLOCK = 32
PLAIN_ROPE = ("default", "llama3", "linear")


def check(config: Any, tokenizer: Any = None) -> None:
    """Raise ValueError for a model or a tokenizer that `write_model` cannot write."""
    architecture = architecture_of(config)
    row = ARCHITECTURES[architecture]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != row.activation:
        raise ValueError(f"GGUF's {architecture} has the activation {row.activation}, the model has {activation}")
    if getattr(config, "use_sliding_window", False):
        raise ValueError(f"use_sliding_window: GGUF's {architecture} has no sliding window")
    rope = config.rope_parameters
    if "full_attention" in rope:
        allowed, rope = ("default", "linear"), rope["full_attention"]
    else:
        allowed = PLAIN_ROPE if architecture == "llama" else ("default",)
    if rope["rope_type"] not in allowed:
        raise ValueError(f"rope scaling {rope['rope_type']!r} cannot be written to a GGUF file of a {architecture}")
    if row.scalar_layers is not None:
        implied = row.query_scalar(
            config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.head_dim
        )
        if config.query_pre_attn_scalar != implied:
            raise ValueError(
                f"query_pre_attn_scalar {config.query_pre_attn_scalar}: GGUF's {architecture} of this size has "
                f"{implied}, and no place for another"
            )
    if tokenizer is not None:
        write_tokenizer(gguf.GGUFWriter(None, architecture), tokenizer, config.vocab_size)


def write_model(model: Any, tokenizer: Any, path: str | Path, kind: str = "f16") -> None:
    """Write a causal language model of transformers, and its tokenizer.

    Args:
        model: of plain layers, as merge_and_unload returns it.
        tokenizer: a fast tokenizer; None leaves it out.
        path: the file.
        kind: "f16" or "q8_0".

    Raises:
        ValueError: a model, a tokenizer or a kind that cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"write_model: kind {kind!r} is not known, expected {' or '.join(KINDS)}")
    config = model.config
    check(config)
    architecture = architecture_of(config)
    encoding, file_type = KINDS[kind]
    with whole_file(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        add_config(writer, config, architecture)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if tokenizer is not None:
            write_tokenizer(writer, tokenizer, config.vocab_size)
        tensors = model_tensors(model, architecture)
        kinds = {name: kind_of(value, encoding) for name, value in tensors.items()}
        for name, value in tensors.items():
            nbytes = math.prod(gguf.quants.quant_shape_to_byte_shape(value.shape, kinds[name]))
            writer.add_tensor_info(name, value.shape, np.dtype(np.float32), nbytes, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors.items():
            plain = ARCHITECTURES[architecture].to_gguf(name, value.detach().float().cpu(), config)
            writer.write_tensor_data(gguf.quants.quantize(plain.contiguous().numpy(), kinds[name]))
        writer.close()


def kind_of(value: Tensor, encoding: Any) -> Any:
    """How a tensor is encoded: vectors in float32, matrices as asked, unless their rows are not whole blocks."""
    if value.dim() < 2:
        return F32
    return F16 if encoding == Q8_0 and value.shape[-1] % Q8_0_BLOCK else encoding


def model_tensors(model: Any, architecture: str) -> dict[str, Tensor]:
    """The model's parameters under GGUF's names, and the frequency factors of a scaled rotary embedding."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {}
    for name, value in model.state_dict().items():
        if not (tied and name.startswith("lm_head.")):
            tensors[gguf_name(name, architecture)] = value
    if architecture == "llama" and model.config.rope_parameters["rope_type"] != "default":
        tensors["rope_freqs.weight"] = frequency_factors(model)
    return tensors


def frequency_factors(model: Any) -> Tensor:
    """By what each frequency of the rotary embedding is divided (Llama 3's scaling, or the same for all)."""
    config, scaled = model.config, model.model.rotary_emb.inv_freq.detach().float().cpu()
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)).double() / len(scaled))
    return (plain / scaled.double()).float()


def add_config(writer: Any, config: Any, architecture: str) -> None:
    """The metadata that `load_config` and llama.cpp read."""
    writer.add_name(Path(str(config._name_or_path)).name or architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma3" and rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if ARCHITECTURES[architecture].scalar_layers is not None:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
