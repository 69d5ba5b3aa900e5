"""The base model in 4 bits and its tokenizer, from a Hugging Face directory or id or a .gguf file; its adapter."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from pyqlora.finetune.options import Options
from pyqlora.hub import reason_to_lack


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
        elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
            raise FileNotFoundError(f"{path}: no such model directory or .gguf file")
        elif reason := reason_to_lack(model, "config.json"):
            raise FileNotFoundError(f"{path}: no such model directory or .gguf file, and {reason}")

    def context(self) -> int | None:
        """The longest sequence the model was made for, in tokens, where its config says so."""
        return getattr(self.config().get_text_config(), "max_position_embeddings", None)

    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token."""
        if self.gguf is None:
            return self.tokenizer_in(self.model)
        from pyqlora.integrations.gguf_tokenizer import load_tokenizer

        return _with_padding(load_tokenizer(self.gguf))

    @staticmethod
    def tokenizer_in(place: str) -> Any:
        """The tokenizer in a directory, or of an id, with a padding token.

        Raises:
            ValueError: there is none that can be read.
        """
        from transformers import AutoTokenizer

        try:
            return _with_padding(AutoTokenizer.from_pretrained(place))
        except Exception as error:
            raise ValueError(f"{place}: the tokenizer cannot be loaded: {error}") from error

    def base(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model with its linear layers in NF4, double-quantized; everything else in `dtype`."""
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_model

            return load_model(self.gguf, device, dtype)
        import pyqlora

        config = pyqlora.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return self._from_pretrained(device, dtype, quantization_config=config)

    def original(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model in `dtype`, not quantized.

        Raises:
            ValueError: the model's files hold it in 4 bits.
        """
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_model

            return load_model(self.gguf, device, dtype, quant_type=None)
        if getattr(self.config(), "quantization_config", None) is not None:
            raise ValueError(f"{self.model}: these files are quantized already; the original weights are not there")
        return self._from_pretrained(device, dtype)

    def dtype(self) -> torch.dtype:
        """The 16-bit type in which the model is stored; bfloat16 for one that is stored in another."""
        stored = None if self.gguf is not None else getattr(self.config(), "dtype", None)
        return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16

    def _from_pretrained(self, device: torch.device, dtype: torch.dtype, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, device_map={"": device}, **kwargs)
        except Exception as error:
            raise ValueError(f"{self.model}: the model cannot be loaded: {error}") from error
        return model.eval()

    def config(self) -> Any:
        """The transformers config.

        Raises:
            ValueError: there is none that can be read.
        """
        if self.gguf is not None:
            from pyqlora.integrations.gguf import load_config

            return load_config(self.gguf)
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.model)
        except Exception as error:
            raise ValueError(f"{self.model}: the model's config cannot be loaded: {error}") from error


def _with_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_lora(model: Any, path: str, name: str = "default") -> Any:
    """The model under a saved adapter, frozen; a model that has adapters already gets it beside those.

    Args:
        model: the base model or a PeftModel.
        path: the adapter's directory or repository.
        name: what to call it.

    Raises:
        ValueError: no adapter there, or one that does not fit the model in every key and shape.
    """
    import pyqlora

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is raised below
        config = pyqlora.PeftConfig.from_pretrained(path)
        config.inference_mode = True
        try:
            if not isinstance(model, pyqlora.PeftModel):
                model = pyqlora.PeftModelForCausalLM(model, config, name)
            result = model.load_adapter(path, name)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: this adapter does not fit the model: {error}") from error
    for keys, problem in (
        (result.missing_keys, "the adapter has no weights for"),
        (result.unexpected_keys, "the model has no place for"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{path}: this adapter does not fit the model: {problem} {keys[0]}{more}")
    return model


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
    model = pyqlora.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return pyqlora.get_peft_model(model, config)
