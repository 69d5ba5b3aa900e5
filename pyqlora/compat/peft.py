"""The module tree of PEFT, and the names of it that its users' internals need beside LoRA's own."""

from __future__ import annotations

import importlib.metadata
import re

from pyqlora import inject
from pyqlora.compat.stand_in import refused_class, refused_function, refused_request
from pyqlora.config import LoraConfig, PeftType
from pyqlora.lora_layer import LoraLayer
from pyqlora.tuner import LoraModel

NAME = "peft"
VERSION = "0.22.0"  # the least that transformers 5.24 takes, which has no release yet; files are those of 0.21


# Methods other than LoRA, and LoRA's variants that are configured by a class of their own. Their configs can be made,
# which programs do at import, and raise when a model is to be adapted with them.
_METHODS = re.findall(
    r"\w+",
    """
    AdaLora Adamss AdaptionPrompt Beft BOFT C3A Cartridge CPT Deft Delora FourierFT Frod Glora Gralora Hira HRA IA3 Lily
    LNTuning LoHa LoKr Miss MultitaskPromptTuning OFT OSF Peanut Poly PrefixTuning PromptEncoder PromptLearning
    PromptTuning Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora TrainableTokens UniLora VBLoRA Vera WaveFT
    XLora
    """,
)
_VARIANTS = ("Arrow", "BdLora", "Corda", "Kasa", "LoraGA", "Monteclora", "Velora")


def _refusal(name: str) -> str:
    return f"peft.{name} is not part of pyqlora, which adapts with LoRA: use LoraConfig, or PEFT without the stand-in"


_REFUSED = (
    {f"{name}Config": refused_request(f"{name}Config", _refusal(f"{name}Config")) for name in (*_METHODS, *_VARIANTS)}
    | {
        name: refused_class(name, _refusal(name))
        for name in [
            *(f"{method}Model" for method in _METHODS),
            *("CPTEmbedding", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"),
        ]
    }
    | {
        name: refused_function(_refusal(name))
        for name in [
            *("convert_to_lora", "create_arrow_model", "find_kappa_target_modules", "preprocess_corda"),
            *("preprocess_loraga", "replace_lora_weights_loftq", "save_as_lora"),
        ]
    }
)
_MAPPINGS = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": {PeftType.LORA: LoraConfig},
    "PEFT_TYPE_TO_TUNER_MAPPING": {PeftType.LORA: LoraModel},
    "PEFT_TYPE_TO_PREFIX_MAPPING": {PeftType.LORA: LoraModel.prefix},
}
_CONSTANTS = {
    "CONFIG_NAME": "adapter_config.json",
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "DUMMY_TARGET_MODULES": "dummy-target-modules",
    "EMBEDDING_LAYER_NAMES": ["embed_tokens", "lm_head"],
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": inject.ALL_LINEAR,
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": inject.CONDENSE_FROM,
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "SEQ_CLS_HEAD_NAMES": list(inject.CLASSIFIER_HEADS),
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": inject.DEFAULT_TARGETS,
    "WEIGHTS_NAME": "adapter_model.bin",
}
_BASES = {"BaseTuner": LoraModel, "BaseTunerLayer": LoraLayer, "PeftWarning": UserWarning}


def _transformers_at_least(*wanted: int) -> bool:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[: len(wanted)]) >= wanted


# Quantized formats other than bitsandbytes' are not looked for.
_ABSENT = ("aqlm", "auto_awq", "eetq", "gptqmodel", "hqq", "inc", "optimum", "te", "te_pytorch", "torchao", "xpu")
_IMPORT_UTILS = {f"is_{package}_available": lambda: False for package in _ABSENT} | {
    "is_bnb_available": lambda: True,
    "is_bnb_4bit_available": lambda: True,
    "is_transformers_ge_v5": _transformers_at_least(5),
    "is_transformers_ge_v5_1_0": _transformers_at_least(5, 1),
    "is_transformers_ge_v5_6_0": _transformers_at_least(5, 6),
}

_INNER = (
    "pyqlora.compat.peft_internals",
    "pyqlora.compat.peft_behaviour",
    "pyqlora.compat.peft_functional",
    _CONSTANTS,
    _BASES,
    _MAPPINGS,
)  # its functions before the core's of that name
_CORE = (
    *("pyqlora", "pyqlora.config", "pyqlora.inject", "pyqlora.layers", "pyqlora.lora_layer"),
    *("pyqlora.auxiliary", "pyqlora.trainable_tokens", "pyqlora.attention", "pyqlora.parameters", "pyqlora.kinds"),
)
_ALL = (*_INNER, *_CORE, _REFUSED)

_PATHS = (
    *("config", "functional", "mapping", "mapping_func", "peft_model"),
    *("tuners", "tuners.lora", "tuners.lora.config", "tuners.lora.layer", "tuners.lora.model", "tuners.tuners_utils"),
    *("utils", "utils.constants", "utils.integrations", "utils.other", "utils.peft_types", "utils.quantization_utils"),
    "utils.save_and_load",
)

MODULES = {
    "": _ALL,
    **dict.fromkeys(_PATHS, _ALL),
    "import_utils": (_IMPORT_UTILS,),
    "helpers": ("pyqlora.helpers",),
    "utils.hotswap": ("pyqlora.hotswap",),
    "utils.transformers_weight_conversion": ("pyqlora.compat.transformers_conversion",),
    "optimizers": ("pyqlora.loraplus", "pyqlora.optim"),
    "optimizers.loraplus": ("pyqlora.loraplus",),
    "tuners.lora.eva": ("pyqlora.eva",),
    "tuners.lora.dora": ("pyqlora.variants",),
    "tuners.lora.variants": ("pyqlora.variants",),
}
