"""The weight of a base layer as a dense tensor, whatever holds it: a plain parameter or 4-bit blocks."""

from __future__ import annotations

import copy
import math
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with an [in, out] weight; told by name, not by import."""
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(layer).mro())


def quant_state(layer: nn.Module) -> Any:
    """The QuantState of a layer whose weight lies in 4-bit blocks; None for any other.

    FSDP replaces the parameter by a plain one; the layer knows the state then.
    """
    return getattr(getattr(layer, "weight", None), "quant_state", None) or getattr(layer, "quant_state", None)


def is_4bit(layer: nn.Module) -> bool:
    """Whether the layer's weight lies in 4-bit blocks: a quantized Linear4bit, pyqlora's or bitsandbytes'."""
    return quant_state(layer) is not None


def float_dtype(layer: nn.Module, weight: Tensor) -> torch.dtype | None:
    """The dtype in which an adapter of the layer's weight starts; None where the weight does not tell."""
    dtype = getattr(layer, "compute_dtype", None) if is_4bit(layer) else weight.dtype
    return dtype if dtype in FLOATS else None


def read(layer: nn.Module) -> Tensor | None:
    """A new float32 tensor (float64 for such a weight) of the weight's values; None for a format unknown here."""
    if is_4bit(layer):
        from pyqlora.functional import dequantize_4bit

        state = copy.copy(quant_state(layer))
        state.dtype = torch.float32
        return dequantize_4bit(layer.weight.data, state).view(state.shape)
    return widened(layer.weight)


def widened(weight: Tensor) -> Tensor | None:
    """A copy in float32 (float64 of such a tensor); None for a dtype unknown here."""
    if weight.dtype not in FLOATS:
        return None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def write(layer: nn.Module, weight: Tensor) -> None:
    """Replace the weight's values, rounded or quantized to what the layer holds; `weight` stays the caller's."""
    if is_4bit(layer):
        layer.weight = requantized(layer, weight).weight
    else:
        layer.weight.data = weight.to(layer.weight.dtype, copy=True)


def plain_linear(layer: nn.Module, weight: Tensor | None = None) -> nn.Linear:
    """An nn.Linear with the weight (default: the layer's own) and bias of a 4-bit layer, in its original dtype."""
    weight = read(layer) if weight is None else weight
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(quant_state(layer).dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return linear.train(layer.training)


def requantized(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A 4-bit layer like `layer` with other values, quantized in the same format."""
    from pyqlora.nn import Params4bit

    state = quant_state(layer)
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.weight = Params4bit(
        weight.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=layer.weight.dtype,
        module=new,
    ).to(layer.weight.device)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return new


def numel(parameter: Tensor) -> int:
    """Elements of a parameter, counted before packing."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return math.prod(state.shape)
    return parameter.numel()


def dequantize_model(model: nn.Module) -> None:
    """Replace every 4-bit layer by a plain one, and take away what marks a transformers model as quantized."""
    found = [(name, module) for name, module in model.named_modules() if name and is_4bit(module)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain_linear(module))
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if getattr(model, flag, False):
            setattr(model, flag, False)
    for attribute in ("hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def with_values(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A module that computes what `module` does, but with these tensors in place of its own of that name.

    All else is shared, and `module` stays as it is: several threads may run one with different values at a time.
    """
    own, plain, by_class = {}, {}, {}
    for name, value in values.items():
        # FSDP has plain attributes before parameters; of a parametrized one torch has put a property into the class.
        (plain if name in module.__dict__ else own if name in module._parameters else by_class)[name] = value
    kind = type(module)
    if by_class:
        kind = type(kind.__name__, (kind,), by_class)
    twin = object.__new__(kind)
    twin.__dict__ = {name: _rebound(value, module, twin) for name, value in module.__dict__.items()}
    twin.__dict__.update(plain, _parameters={**module._parameters, **own})
    return twin


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method or partial of `old`, such as a forward that accelerate has replaced, as one of `new`."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, partial) and value.args and value.args[0] is old:
        return partial(value.func, new, *value.args[1:], **value.keywords)
    return value
