"""The base model in 4 bits and its tokenizer, from a Hugging Face directory or id or a .gguf file; its adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pyqlora.finetune.options import Options


def pick_device() -> tuple[torch.device, torch.dtype]:
    """Where to train and in which type: a GPU in bf16 (fp16 before sm_80), otherwise the CPU in fp32.

    Few CPUs multiply bf16 faster than fp32, and the weights are in 4 bits either way.
    """
    from pyqlora import _C

    if _C.with_cuda and torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return torch.device("cpu"), torch.float32


class Source:
    """A model's place, checked; opens its tokenizer and its weights separately, since data is checked in between.

    Args:
        model: a Hugging Face directory or id, or a .gguf file.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or it is not one that can be loaded.
    """

    def __init__(self, model: str):
        self.model = model
        self.gguf = None
        path = Path(model)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such GGUF file")
            from pyqlora.integrations.gguf import GGUFFile, load_config

            self.gguf = GGUFFile(path)
            load_config(self.gguf)
        elif path.is_dir():
            if not (path / "config.json").is_file():
                raise FileNotFoundError(f"{path}: no config.json in this directory, so it holds no Hugging Face model")
        elif path.exists():
            raise ValueError(f"{path}: expected a Hugging Face model directory or a .gguf file")
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            raise FileNotFoundError(f"{path}: no such model directory or .gguf file")

    def context(self) -> int | None:
        """The longest sequence the model was made for, in tokens, where its config says so."""
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_config

            config = load_config(self.gguf)
        else:
            from transformers import AutoConfig

            try:
                config = AutoConfig.from_pretrained(self.model)
            except Exception as error:
                raise ValueError(f"{self.model}: the model's config cannot be loaded: {error}") from error
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token."""
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_tokenizer

            tokenizer = load_tokenizer(self.gguf)
        else:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model)
            except Exception as error:
                raise ValueError(f"{self.model}: the tokenizer cannot be loaded: {error}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def base(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model with its linear layers in NF4, double-quantized; everything else in `dtype`."""
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_model

            return load_model(self.gguf, device, dtype)
        from transformers import AutoModelForCausalLM

        import pyqlora

        config = pyqlora.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.model, quantization_config=config, dtype=dtype, device_map={"": device}
            )
        except Exception as error:
            raise ValueError(f"{self.model}: the model cannot be loaded: {error}") from error
        return model.eval()


def add_lora(model: Any, options: Options) -> Any:
    """The model under a fresh LoRA adapter, seeded by options.seed.

    Raises:
        ValueError: the model has no linear layers to adapt, or options.targets matches none.
    """
    import pyqlora
    from pyqlora.nn import Linear4bit

    if not any(isinstance(module, Linear4bit) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no linear layers outside its output layer, so LoRA fits nowhere")
    torch.manual_seed(options.seed)
    config = pyqlora.LoraConfig(
        r=options.r, lora_alpha=options.alpha, target_modules=options.target_modules, task_type="CAUSAL_LM"
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return pyqlora.get_peft_model(model, config)
