"""transformers' attention in float32 where a CPU is slow in 16 bits.

Without 16-bit matrix instructions, torch's attention spends most of a bf16 training step in its backward pass (8 times
the float32 one's time on an AVX2 machine). `use_float32_attention` has a model's sdpa attention computed in float32 and
its result rounded once while it trains: faster and more exact. In eval mode nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMPLEMENTATION = "pyqlora_sdpa_float32"  # the name under which transformers finds it


def use_float32_attention(model: Any) -> bool:
    """Switch a transformers model from "sdpa" to float32 attention if it is a 16-bit model on a CPU that gains by it.

    Returns:
        Whether it was switched.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return False
    dtype, device = getattr(model, "dtype", None), getattr(model, "device", None)
    if device is None or device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or _is_native(dtype):
        return False
    _register()
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def _is_native(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this dtype."""
    name = "_is_avx512_bf16_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    supported = getattr(torch.cpu, name, None)
    return supported is not None and supported()


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, float32_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def float32_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention: in training on the CPU computed in float32, returned in the query's dtype."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    if module.training and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), weights
