"""QLoRA fine-tuning in 4 bits on native CUDA and CPU kernels, under the API of bitsandbytes and PEFT."""

import importlib

from pyqlora.adapter_files import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from pyqlora.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from pyqlora.base_weights import get_base_model_state_dict, set_base_model_state_dict
from pyqlora.config import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    TaskType,
    get_peft_config,
)
from pyqlora.eva import get_eva_state_dict, initialize_lora_eva_weights
from pyqlora.kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
from pyqlora.low_rank import LinearWithLoRA, LoRALayer, replace_linear_with_lora
from pyqlora.matmul import matmul_4bit
from pyqlora.model import PeftModel
from pyqlora.ops.linear_cross_entropy import linear_cross_entropy
from pyqlora.ops.selective_checkpointing import selective_checkpointing
from pyqlora.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from pyqlora.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from pyqlora.tuner import LoraModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BitsAndBytesConfig",
    "EvaConfig",
    "LinearWithLoRA",
    "LoRALayer",
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
    "TunerLayerStatus",
    "TunerModelStatus",
    "cast_mixed_precision_params",
    "causal_lm_loss",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "linear_cross_entropy",
    "load_peft_weights",
    "matmul_4bit",
    "prepare_model_for_kbit_training",
    "replace_linear_with_lora",
    "selective_checkpointing",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]

__version__ = "0.1.0"

_LAZY = {  # these import transformers
    "BitsAndBytesConfig": "pyqlora.integrations.transformers",
    "causal_lm_loss": "pyqlora.integrations.causal_lm",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
