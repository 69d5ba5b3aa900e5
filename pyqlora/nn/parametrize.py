"""4-bit weights in any module, without changing it: a parameter becomes packed data that is decoded when it is read.

For weights outside of linear layers, the 3-D expert tensors of mixture-of-experts models among them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from pyqlora.quant import QuantState, dequantize_4bit, quantize_4bit


class Bnb4bitParametrization(nn.Module):
    """Decodes a packed parameter to the shape and dtype of its `quant_state`."""

    def __init__(self, quant_state: QuantState):
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The dequantized parameter."""
        return dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize one parameter of any shape; reading it decodes it, at most once during the module's forward.

    Args:
        module: the module that owns the parameter.
        param_name: its name there.
        compress_statistics: quantize the block scales too.
        quant_type: "nf4" or "fp4".
        blocksize: elements per scale; 64 if not given.

    Raises:
        AttributeError: the module has no attribute of that name.
        TypeError: it is not a parameter.
    """
    param = _parameter(module, param_name)
    packed, state = quantize_4bit(param.data, blocksize or 64, quant_type, compress_statistics)
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """As `replace_parameter_4bit`, for a parameter that holds packed data already; `qs_dict` as a checkpoint has it."""
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    param = getattr(module, name)
    if not isinstance(param, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return param


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, name: str) -> None:
    register = getattr(module, "register_state_dict_post_hook", None) or module._register_state_dict_hook  # torch 2.4
    register(partial(_parametrized_state_dict_post_hook, param_name=name))
    # always_call: checkpointing ends a recomputed forward by an exception, after which the cache must close too
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    P._cache_enabled = max(0, P._cache_enabled - 1)
    if not P._cache_enabled:
        P._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    """Save the packed data under the parameter's own name, with its quantization state beside it."""
    original = f"{prefix}parametrizations.{param_name}.original"
    if original in state_dict:
        state_dict[f"{prefix}{param_name}"] = state_dict.pop(original)
        (decoder,) = (p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization))
        for key, value in decoder.quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{param_name}.{key}"] = value
