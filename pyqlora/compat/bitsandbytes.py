"""The module tree of bitsandbytes, and the names of it that only its own users' internals need."""

from __future__ import annotations

from typing import Any

import torch

NAME = "bitsandbytes"
VERSION = "0.50.2"


def _refusal(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"bitsandbytes.{name}: LLM.int8 is not part of pyqlora. Use 4-bit layers instead: Linear4bit, or "
        "BitsAndBytesConfig(load_in_4bit=True) with transformers; for int8 uninstall the stand-in and use bitsandbytes."
    )


def _refused_function(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise _refusal(name)

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse


def _refused_class(name: str, base: type = object) -> type:
    """A class for isinstance to say no to, which cannot be made."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> None:
        raise _refusal(name)

    return type(name.rpartition(".")[2], (base,), {"__new__": refuse, "__doc__": f"Not part of pyqlora: {name}."})


def has_avx512bf16() -> bool:
    """False: packed weights keep one layout whatever the CPU has, so nothing needs converting."""
    return False


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the kernels on the tensor's device."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)


_INT8_FUNCTIONS = {
    name: _refused_function(f"functional.{name}")
    for name in (
        "int8_double_quant",
        "int8_linear_matmul",
        "int8_mm_dequant",
        "int8_vectorwise_dequant",
        "int8_vectorwise_quant",
    )
}
_INT8_LAYERS = {
    "Embedding8bit": _refused_class("nn.Embedding8bit", torch.nn.Embedding),
    "Int8Params": _refused_class("nn.Int8Params", torch.nn.Parameter),
    "Linear8bitLt": _refused_class("nn.Linear8bitLt", torch.nn.Linear),
    "OutlierAwareLinear": _refused_class("nn.OutlierAwareLinear", torch.nn.Linear),
}
_MATMUL = {
    "MatmulLtState": _refused_class("MatmulLtState"),
    "matmul": _refused_function("matmul"),
}
_DEVICES = {"features": {"multi_backend"}, "supported_torch_devices": {"cpu", "cuda"}}

MODULES = {
    "": ("pyqlora", _MATMUL, _DEVICES),
    "autograd": (),
    "autograd._functions": ("pyqlora.matmul", _MATMUL),
    "cextension": ({"HIP_ENVIRONMENT": torch.version.hip is not None},),
    "functional": ("pyqlora.functional", _INT8_FUNCTIONS, {"has_avx512bf16": has_avx512bf16}),
    "nn": ("pyqlora.nn", _INT8_LAYERS),
    "nn.modules": ("pyqlora.nn", _INT8_LAYERS),
    "utils": ({"sync_gpu": sync_gpu},),
}
