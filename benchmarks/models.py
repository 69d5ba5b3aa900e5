"""The same model three times: pyqlora, bitsandbytes + PEFT, and PEFT on the dense one; random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import pyqlora
from pyqlora.integrations import transformers as quantizer

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IMPLEMENTATIONS = ("pyqlora", "bitsandbytes", "torch dense")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", ATTENTION)]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
_directory = tempfile.TemporaryDirectory()


def checkpoint(**sizes: Any) -> Path:
    """A directory with a Llama of these sizes and random weights, float32; made once."""
    path = Path(_directory.name) / "-".join(map(str, sizes.values()))
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    return path


def load(implementation: str, path: Path, dtype: torch.dtype) -> Any:
    """The model: in NF4 with double quantization by either library, or dense."""
    kwargs = {"dtype": dtype, "device_map": {"": "cpu"}}
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    quantizer.unregister()
    if implementation == "pyqlora":
        quantizer.register()
        kwargs["quantization_config"] = pyqlora.BitsAndBytesConfig(**four_bits)
    elif implementation == "bitsandbytes":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(**four_bits)
    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    finally:
        quantizer.register()


def adapted(
    implementation: str, path: Path, dtype: torch.dtype, r: int = 16, dropout: float = 0.0, selective: bool = False
) -> Any:
    """The model under a LoRA adapter on all projections, ready to train with gradient checkpointing.

    `selective` keeps the results of products: pyqlora's of 4-bit layers and attention, the peers' of all by torch's own
    selective checkpointing.
    """
    model = load(implementation, path, dtype)
    library = pyqlora if implementation == "pyqlora" else peft
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        by_torch = partial(create_selective_checkpoint_contexts, PRODUCTS)
        how["context_fn"] = pyqlora.selective_checkpointing if implementation == "pyqlora" else by_torch
    if implementation == "torch dense":
        model.gradient_checkpointing_enable(how)
        model.enable_input_require_grads()
    else:
        model = library.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
    torch.manual_seed(1)
    config = library.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    return library.get_peft_model(model, config)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss as a training script computes it: the model's own, pyqlora's in chunks."""
    if isinstance(model, pyqlora.PeftModel):
        return pyqlora.causal_lm_loss(model, ids, input_ids=ids)
    return model(input_ids=ids, labels=ids).loss


def as_installed(implementation: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, for a peer as it is without pyqlora: a rotary position embedding of pyqlora would serve its model too."""
    if implementation == "pyqlora":
        return run

    def without(*args: Any, **kwargs: Any) -> Any:
        ours = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = getattr(ours, "_switched_from", ours)
        try:
            return run(*args, **kwargs)
        finally:
            modeling_llama.apply_rotary_pos_emb = ours

    return without
