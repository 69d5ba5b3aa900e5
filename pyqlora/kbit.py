"""A quantized or half-precision model made ready for training adapters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from pyqlora.integrations.attention import use_cpu_attention
from pyqlora.integrations.blocks import use_cpu_blocks
from pyqlora.integrations.rotary import use_cpu_rotary


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze the base model, checkpoint its activations and, on a CPU, train with pyqlora's attention and norms.

    Unlike PEFT's, this changes no parameter's dtype. Float32 embeddings and output head would double the largest plain
    tensors of the model, and float32 norm weights make a half-precision model's activations float32 from there on; the
    norms compute in float32 inside as it is, and the adapters are float32.

    Args:
        model: a transformers model, 4-bit or not.
        use_gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        gradient_checkpointing_kwargs: for torch.utils.checkpoint; default use_reentrant=False, which works wherever
            the adapters are.
        auto_clear_cache: accepted as in PEFT; nothing is allocated here, so there is nothing to clear.

    Returns:
        The same model.
    """
    model.requires_grad_(False)
    use_cpu_attention(model)
    use_cpu_blocks(model)
    use_cpu_rotary(model)
    if use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        enable_gradient_checkpointing(model, gradient_checkpointing_kwargs)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """For training with autocast: what is trained in float32, which small updates need, and the rest in `dtype`.

    Weights in 4 bits stay as they are.

    Args:
        model: a model with adapters, or any other.
        dtype: for what is frozen, torch.float16 or torch.bfloat16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def enable_gradient_checkpointing(model: nn.Module, kwargs: dict[str, Any] | None = None) -> None:
    """Turn checkpointing on and make the first block's input require a gradient, without which none would flow."""
    kwargs = {"use_reentrant": False} if kwargs is None else kwargs
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs=kwargs)
    elif "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable()
    require_input_grads(model)


def require_input_grads(model: nn.Module) -> None:
    """Make the embeddings' output require a gradient; done once however often it is asked for."""
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None):
        return
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    model._require_grads_hook = handle


def uses_gradient_checkpointing(model: nn.Module) -> bool:
    """Whether checkpointing is on anywhere in the model."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
