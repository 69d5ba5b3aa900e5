"""QLoRA fine-tuning in 4 bits on native CUDA and CPU kernels, under the API of bitsandbytes and PEFT."""

import importlib

from pyqlora.matmul import matmul_4bit

__all__ = ["BitsAndBytesConfig", "matmul_4bit"]

__version__ = "0.1.0"

_LAZY = {"BitsAndBytesConfig": "pyqlora.integrations.transformers"}  # these import transformers


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
