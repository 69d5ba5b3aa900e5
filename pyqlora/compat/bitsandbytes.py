"""The module tree of bitsandbytes, and the names of it that only its own users' internals need."""

from __future__ import annotations

import torch

from pyqlora.compat.lars import PytorchLARS
from pyqlora.compat.stand_in import refused_class, refused_function

NAME = "bitsandbytes"
VERSION = "0.50.2"


def _refusal(name: str) -> str:
    return (
        f"bitsandbytes.{name}: LLM.int8 is not part of pyqlora. Use 4-bit layers instead: Linear4bit, or "
        "BitsAndBytesConfig(load_in_4bit=True) with transformers; for int8 run bitsandbytes without the stand-in"
    )


def has_avx512bf16() -> bool:
    """False: packed weights keep one layout whatever the CPU has, so nothing needs converting."""
    return False


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the kernels on the tensor's device."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)


_INT8_FUNCTIONS = {
    name: refused_function(_refusal(f"functional.{name}"))
    for name in (
        "int8_double_quant",
        "int8_linear_matmul",
        "int8_mm_dequant",
        "int8_vectorwise_dequant",
        "int8_vectorwise_quant",
    )
}
_INT8_LAYERS = {
    "Embedding8bit": refused_class("Embedding8bit", _refusal("nn.Embedding8bit"), torch.nn.Embedding),
    "Int8Params": refused_class("Int8Params", _refusal("nn.Int8Params"), torch.nn.Parameter),
    "Linear8bitLt": refused_class("Linear8bitLt", _refusal("nn.Linear8bitLt"), torch.nn.Linear),
    "OutlierAwareLinear": refused_class("OutlierAwareLinear", _refusal("nn.OutlierAwareLinear"), torch.nn.Linear),
}
_MATMUL = {
    "MatmulLtState": refused_class("MatmulLtState", _refusal("MatmulLtState")),
    "matmul": refused_function(_refusal("matmul")),
}
_DEVICES = {"features": {"multi_backend"}, "supported_torch_devices": {"cpu", "cuda"}}

_OPTIMIZER_MODULES = ("adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd")

MODULES = {
    "": ("pyqlora", _MATMUL, _DEVICES),
    "autograd": (),
    "autograd._functions": ("pyqlora.matmul", _MATMUL),
    "cextension": ({"HIP_ENVIRONMENT": torch.version.hip is not None},),
    "functional": ("pyqlora.functional", _INT8_FUNCTIONS, {"has_avx512bf16": has_avx512bf16}),
    "nn": ("pyqlora.nn", _INT8_LAYERS),
    "nn.modules": ("pyqlora.nn", _INT8_LAYERS),
    "nn.parametrize": ("pyqlora.nn.parametrize",),
    "optim": ("pyqlora.optim", {"PytorchLARS": PytorchLARS}),
    **dict.fromkeys([f"optim.{name}" for name in _OPTIMIZER_MODULES], ("pyqlora.optim",)),
    "optim.ademamix": ("pyqlora.optim", "pyqlora.compat.ademamix"),
    "optim.lars": ("pyqlora.optim", "pyqlora.compat.lars"),
    "utils": ({"sync_gpu": sync_gpu},),
}
