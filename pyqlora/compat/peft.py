"""The module tree of PEFT, and the names of it that its users' internals need beside LoRA's own."""

from __future__ import annotations

import abc
import importlib.metadata
import re

import torch
from torch import nn

from pyqlora import inject
from pyqlora.auxiliary import ModulesToSaveWrapper
from pyqlora.compat.stand_in import refused_class, refused_function, refused_request
from pyqlora.config import LoraConfig, PeftType
from pyqlora.lora_layer import LoraLayer
from pyqlora.tuner import LoraModel

NAME = "peft"
VERSION = "0.21.2"


class AuxiliaryTrainingWrapper(abc.ABC):  # noqa: B024 - for isinstance only
    """What trains beside LoRA layers: whole modules and single tokens."""


AuxiliaryTrainingWrapper.register(ModulesToSaveWrapper)


def infer_device() -> str:
    """The kind of accelerator that torch sees, or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module with a dotted name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The weight as [out, in]."""
    return weight.T if fan_in_fan_out else weight


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether the config targets the module of that name."""
    return inject.match(config, key)


def inspect_matched_modules(tuner: LoraModel, adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of the modules that an adapter's config targets, and of those it does not."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        found["matched" if inject.match(config, name) else "unmatched"].append(name)
    return found


def _maybe_include_all_linear_layers(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == inject.ALL_LINEAR:
        peft_config.target_modules = inject.all_linear_names(peft_config, model)
    return peft_config


# Methods other than LoRA, and LoRA's variants that are configured by a class of their own. Their configs can be made, as
# test files do at import, and raise when a model is to be adapted with them.
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
            *("CPTEmbedding", "PeftMixedModel", "PrefixEncoder", "PromptEmbedding", "PromptEncoder"),
        ]
    }
    | {
        name: refused_function(_refusal(name))
        for name in ("convert_to_lora", "create_arrow_model", "preprocess_corda", "preprocess_loraga", "save_as_lora")
    }
)
_MAPPINGS = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": {PeftType.LORA: LoraConfig},
    "PEFT_TYPE_TO_TUNER_MAPPING": {PeftType.LORA: LoraModel},
    "PEFT_TYPE_TO_PREFIX_MAPPING": {PeftType.LORA: LoraModel.prefix},
}
_BASES = {"BaseTuner": LoraModel, "BaseTunerLayer": LoraLayer}
_TUNER_UTILS = _BASES | {
    "_maybe_include_all_linear_layers": _maybe_include_all_linear_layers,
    "check_target_module_exists": check_target_module_exists,
    "inspect_matched_modules": inspect_matched_modules,
}
_CONSTANTS = {
    "CONFIG_NAME": "adapter_config.json",
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "DUMMY_TARGET_MODULES": "dummy-target-modules",
    "EMBEDDING_LAYER_NAMES": ["embed_tokens", "lm_head"],
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": inject.ALL_LINEAR,
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "SEQ_CLS_HEAD_NAMES": list(inject.CLASSIFIER_HEADS),
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": inject.DEFAULT_TARGETS,
    "WEIGHTS_NAME": "adapter_model.bin",
}
_UTILS = _CONSTANTS | {
    "AuxiliaryTrainingWrapper": AuxiliaryTrainingWrapper,
    "_get_submodules": _get_submodules,
    "infer_device": infer_device,
    "transpose": transpose,
}


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

_LAYERS = ("pyqlora.layers", "pyqlora.lora_layer", "pyqlora.tuner", "pyqlora.config", _REFUSED)
_EVERYDAY = ("pyqlora", "pyqlora.inject", "pyqlora.auxiliary", _MAPPINGS)

MODULES = {
    "": (*_EVERYDAY, _REFUSED),
    "config": ("pyqlora.config", _REFUSED),
    "functional": _EVERYDAY,
    "import_utils": (_IMPORT_UTILS,),
    "mapping": _EVERYDAY,
    "mapping_func": _EVERYDAY,
    "peft_model": _EVERYDAY,
    "tuners": (*_LAYERS,),
    "tuners.lora": _LAYERS,
    "tuners.lora.config": _LAYERS,
    "tuners.lora.layer": _LAYERS,
    "tuners.lora.model": (*_LAYERS, _CONSTANTS),
    "tuners.lora.variants": ("pyqlora.variants",),
    "tuners.tuners_utils": (_TUNER_UTILS, *_EVERYDAY),
    "utils": (*_EVERYDAY, _UTILS),
    "utils.constants": (_CONSTANTS,),
    "utils.other": (*_EVERYDAY, _UTILS),
    "utils.peft_types": _EVERYDAY,
    "utils.save_and_load": _EVERYDAY,
}
