"""4-bit weights on any module: a parameter stored packed that reads as its decoded values, through torch's parametrize.

For weights that are no linear layer's, such as the 3-D expert tensors of mixture-of-experts models.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyqlora import quant


class Bnb4bitParametrization(nn.Module):
    """Decodes a packed parameter when it is read; the values carry no gradient.

    Args:
        quant_state: what decodes it.
    """

    def __init__(self, quant_state: quant.QuantState):
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The decoded parameter, in the shape and dtype it had."""
        return quant.dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize `module.<param_name>` in place; from then on the attribute is its decoded values, without a gradient.

    Its state_dict entries are those of a 4-bit layer. Within a forward pass of the module it is decoded once.

    Args:
        module: the module.
        param_name: name of the parameter, of any shape.
        compress_statistics: quantize the block scales too.
        quant_type: "nf4" or "fp4".
        blocksize: elements per scale: 32, 64 (the default), 128 … 4096.

    Raises:
        AttributeError: the module has no such attribute.
        TypeError: the attribute is not a parameter.
    """
    values = _parameter(module, param_name).data
    packed, state = quant.quantize_4bit(
        values, 64 if blocksize is None else blocksize, quant_type, compress_statistics, torch.uint8
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """As `replace_parameter_4bit` for a parameter that is packed already, `qs_dict` being its checkpoint's entries."""
    _parameter(module, param_name)
    _parametrize(module, param_name, quant.QuantState.from_dict(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _parametrize(module: nn.Module, name: str, state: quant.QuantState) -> None:
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Clean names in the state_dict, and one decoding per forward pass however often the parameter is read."""
    module._register_state_dict_hook(partial(_rename_in_state_dict, param_name=param_name))  # public since torch 2.5
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Also when forward raises, as it does where checkpointing stops a recomputation early: else the cache stays on
    # and every decoded weight in it alive.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    parametrize._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)  # a pre-hook before ours may have raised
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def _rename_in_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, param_name: str
) -> None:
    stored = f"{prefix}parametrizations.{param_name}.original"
    if stored not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(stored)
    decode = next(p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization))
    for key, value in decode.quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{key}"] = value
