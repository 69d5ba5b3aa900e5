"""QLoRA fine-tuning in 4 bits on native CUDA and CPU kernels, under the API of bitsandbytes and PEFT."""

import importlib

from pyqlora.adapter_files import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from pyqlora.config import EvaConfig, LoftQConfig, LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType
from pyqlora.kbit import prepare_model_for_kbit_training
from pyqlora.matmul import matmul_4bit
from pyqlora.model import PeftModel
from pyqlora.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from pyqlora.tuner import LoraModel

__all__ = [
    "BitsAndBytesConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "matmul_4bit",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]

__version__ = "0.1.0"

_LAZY = {"BitsAndBytesConfig": "pyqlora.integrations.transformers"}  # these import transformers


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
