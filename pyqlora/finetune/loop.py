"""The training loop: one optimizer step at a time, on the completion tokens only."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyqlora.finetune.batches import Order, collate
from pyqlora.finetune.encode import Encoded
from pyqlora.finetune.evaluate import loss_sum

MAX_GRAD_NORM = 1.0
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Record:
    """What one step did: a line of log.jsonl."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to 0; `step` counts from 1."""
    warmup = math.ceil(WARMUP_SHARE * steps)
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def make_optimizer(name: str, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that --optim names; its learning rate is set at every step."""
    from pyqlora import optim

    kinds = {
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
        "adamw_torch": torch.optim.AdamW,
    }
    return kinds[name](parameters, lr=0.0, weight_decay=0.0)


class Loop:
    """Takes steps; everything that a step depends on is in the model, the optimizer, torch's RNG and the step's number.

    Args:
        model: the model under its adapter.
        optimizer: over the adapter's parameters.
        samples: the training samples.
        order: which samples make up which step.
        steps: length of the whole run, which the learning rate's schedule spans.
        lr: the learning rate's peak.
        pad_token_id: fills the shorter rows of a batch.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        samples: Sequence[Encoded],
        order: Order,
        steps: int,
        lr: float,
        pad_token_id: int,
    ):
        self.model, self.optimizer, self.samples, self.order = model, optimizer, samples, order
        self.steps, self.lr, self.pad_token_id = steps, lr, pad_token_id
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device

    def step(self, number: int) -> Record:
        """Take step `number`, counted from 1.

        Raises:
            RuntimeError: the loss is no longer finite.
        """
        start = time.perf_counter()
        lr = learning_rate(number, self.steps, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, tokens = self.backward(number - 1)
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss became {loss} at step {number}: try a lower --lr than {self.lr:g}")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Record(number, loss, lr, norm, tokens, time.perf_counter() - start)

    def backward(self, index: int) -> tuple[float, int]:
        """Gradients of the mean loss over all trained tokens of step `index`; that loss, and the tokens processed."""
        self.model.train()
        batches = [[self.samples[i] for i in batch] for batch in self.order.step(index)]
        trained = sum(sample.trained for batch in batches for sample in batch)
        total = 0.0
        for batch in batches:
            loss = loss_sum(self.model, *collate(batch, self.pad_token_id, self.device)) / trained
            loss.backward()
            total += loss.item()
        return total, sum(len(sample.ids) for batch in batches for sample in batch)

    def seconds_per_step(self) -> float:
        """Measured on the first two steps without taking them: gradients are dropped, the RNG is put back."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if self.device.type == "cuda" else []):
            self.backward(0)  # warms caches and allocators up
            start = time.perf_counter()
            self.backward(min(1, self.order.steps_per_epoch - 1))
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start
