"""The loss of transformers' causal language models without all their logits: `causal_lm_loss`.

For a batch of 4 × 256 tokens and a vocabulary of 49152, one copy of the logits is 201 MB, and a training step holds
several: more than everything else in a small model's step. Here the model runs with a stand-in for its output layer,
which catches that layer's input, and `pyqlora.ops.linear_cross_entropy` does the rest.

That is the same loss only if the model's logits are what its output layer returns. Some models do more (they cap or
scale the logits, or add an auxiliary loss): this is seen by what becomes of the stand-in's output, one row of known
numbers, and such a model's own loss is computed then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyqlora.nn.output_layer import OutputLayer
from pyqlora.ops.linear_cross_entropy import linear_cross_entropy

_does_more: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # output layers whose models change the logits


def causal_lm_loss(
    model: nn.Module,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int | None = None,
    **inputs: Any,
) -> Tensor:
    """What `model(**inputs, labels=labels).loss` is, with only a chunk of the logits in memory at a time.

    Args:
        model: a causal language model of transformers, bare, in a PeftModel or a wrapper like DistributedDataParallel.
            Where its loss needs all logits (see above), or its output layer is adapted, they are computed as ever.
        labels: [batch, length] token ids, as the model takes them: position i is predicted from those before it; −100
            where there is nothing to predict.
        num_items_in_batch: what the summed loss is divided by; by default the number of labels predicted.
        chunk: rows of logits at a time, see `linear_cross_entropy`.
        inputs: the model's other inputs: input_ids, attention_mask, …

    Returns:
        The loss, a scalar that can be differentiated.
    """
    head = output_layer(model)
    if head is not None and head not in _does_more:
        hidden, plain = _run(model, head, inputs)
        if plain:
            hidden, labels = (tensor.to(head.weight.device) for tensor in (hidden[:, :-1], labels[:, 1:]))
            return linear_cross_entropy(
                hidden, head.weight, labels, head.bias, num_items=num_items_in_batch, chunk=chunk
            )
        _does_more.add(head)
    if num_items_in_batch is not None:
        inputs["num_items_in_batch"] = num_items_in_batch
    return model(**inputs, labels=labels).loss


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that makes the model's logits, where a loss of next tokens can be computed from its input alone."""
    while hasattr(model, "module") or hasattr(model, "get_base_model"):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    if not hasattr(model, "get_output_embeddings"):
        return None
    config, head = model.config, model.get_output_embeddings()
    loss = getattr(model, "loss_function", None)
    next_token = getattr(loss, "__name__", "") == "ForCausalLMLoss" and not config.is_encoder_decoder
    plain = type(head) in (nn.Linear, OutputLayer)
    hooked = plain and (head._forward_hooks or head._forward_pre_hooks)
    return head if next_token and plain and not hooked else None


def _run(model: nn.Module, head: nn.Linear, inputs: dict[str, Any]) -> tuple[Tensor, bool]:
    """The input of the output layer, and whether the model returns what that layer does as its logits, untouched."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        probe = torch.linspace(-50, 50, head.out_features, dtype=hidden.dtype, device=hidden.device)
        seen.extend((hidden, probe.expand(len(hidden), 1, -1)))
        return seen[-1] + hidden[:, -1:, :0].sum(-1, keepdim=True)  # + 0: for autograd it depends on hidden

    before = head.__dict__.get("forward")
    head.forward = forward
    try:
        outputs = model(**inputs)
    finally:
        del head.forward
        if before is not None:
            head.forward = before
    if len(seen) != 2 or getattr(outputs, "aux_loss", None) is not None:
        return seen[0], False
    hidden, probe = seen
    return hidden, outputs.logits.shape == probe.shape and torch.equal(outputs.logits.to(probe.dtype), probe)


class LossOnly:
    """Stands in for a model where only the loss of its inputs is wanted, as in a Trainer's step."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Any) -> dict:
        """{"loss": the model's loss}."""
        return {"loss": causal_lm_loss(self.model, labels, num_items_in_batch, **inputs)}


def chunked(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """`Trainer.compute_loss` that holds no more than a chunk of the logits where nobody asks for them."""

    def compute(
        trainer: Any, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        everything = (
            return_outputs
            or output_layer(model) is None
            or "labels" not in inputs
            or "shift_labels" in inputs
            or trainer.label_smoother is not None
            or trainer.compute_loss_func is not None
            or trainer.is_fsdp_enabled  # outside of forward the output layer's weight is in pieces
            or trainer.is_deepspeed_enabled
        )
        return compute_loss(trainer, model if everything else LossOnly(model), inputs, return_outputs, *args, **kwargs)

    return compute
