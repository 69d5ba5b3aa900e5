"""transformers' attention in training on a CPU, by `pyqlora.ops.attention`.

torch's own is slower there by a third in float32, and in bf16 without 16-bit matrix instructions by far: its backward
pass then takes 8 times the float32 one's time. `use_cpu_attention` has a model's sdpa attention computed by pyqlora
while it trains, in float32 and rounded once to the model's dtype. In eval mode nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyqlora.ops.attention import attention, serves
from pyqlora.ops.backend import is_fast

IMPLEMENTATION = "pyqlora_sdpa"  # the name under which transformers finds it
_UNKNOWN = ("softcap", "position_bias", "s_aux", "output_attentions")  # arguments that change what is computed


def use_cpu_attention(model: Any) -> bool:
    """Switch a transformers model from "sdpa" to pyqlora's attention if it is on a CPU that gains by it.

    Returns:
        Whether it was switched.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return False
    dtype, device = getattr(model, "dtype", None), getattr(model, "device", None)
    if device is None or device.type != "cpu" or not is_fast() or _is_native(dtype):
        return False
    _register()
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def _is_native(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this 16-bit dtype."""
    names = {torch.bfloat16: "_is_avx512_bf16_supported", torch.float16: "_is_amx_fp16_supported"}
    supported = getattr(torch.cpu, names.get(dtype, ""), None)
    return supported is not None and supported()


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: pyqlora's in training where it serves, else sdpa's."""
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    unknown = any(kwargs.get(name) not in (None, False) for name in _UNKNOWN)
    if module.training and not dropout and not unknown and serves(query, key, value, mask):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and mask is None and query.shape[2] > 1
        return attention(query, key, value, mask, causal, scaling).transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
