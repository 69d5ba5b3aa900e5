"""Whether gradients reach the adapters, found out at the first backward pass and said if none does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ADVICE = (
    "Gradient checkpointing with use_reentrant=True cuts them off where a block's input needs no gradient: call "
    "model.enable_input_require_grads(), or checkpoint with use_reentrant=False. Else look for torch.no_grad() or "
    ".detach() on the way, and for targets that the forward pass does not use."
)


def check_first_backward(output: Any, parameters: Callable[[], list[nn.Parameter]], done: Callable[[], None]) -> None:
    """Warn, once the first backward pass from `output` is over, if no adapter parameter has received a gradient.

    Args:
        output: what a forward pass returned: a tensor, or a tuple or dict of some.
        parameters: gives the adapters' trainable parameters; asked when needed.
        done: called when the question is answered, so that later outputs need not be watched.
    """
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    watched = [tensor for tensor in tensors if tensor.requires_grad]
    if not watched:
        done()
        if tensors and parameters():
            warnings.warn(
                "No gradient will reach the adapters: the model's output does not depend on them for autograd. "
                + ADVICE,
                stacklevel=4,
            )
        return
    started: list[bool] = []

    def begin(gradient: Tensor) -> None:
        if started:
            return
        started.append(True)
        arrived: list[bool] = []
        trainable = parameters()
        handles = [parameter.register_hook(lambda gradient: arrived.append(True)) for parameter in trainable]

        def finish() -> None:
            for handle in handles:
                handle.remove()
            done()
            if trainable and not arrived:
                warnings.warn(
                    f"No adapter parameter has received a gradient in this backward pass. {ADVICE}", stacklevel=2
                )

        torch.autograd.Variable._execution_engine.queue_callback(finish)

    for tensor in watched:
        tensor.register_hook(begin)
