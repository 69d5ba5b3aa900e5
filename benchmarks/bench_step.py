"""A training step of SmolLM2-135M's shape beside bitsandbytes + PEFT and PEFT on the dense model.

LoRA r=16 on all seven projections, dropout 0.05, gradient checkpointing (also selective, on all sides), AdamW. Checked:
the losses of two steps, where both 4-bit models start with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import pyqlora
from benchmarks.harness import Case
from benchmarks.models import IMPLEMENTATIONS, SMOLLM2_135M, adapted, checkpoint, loss_of

CASES = [(1, 256, "fp32", False), (1, 256, "fp32", True), (4, 256, "fp32", False), (4, 256, "fp32", True)]
CASES += [(1, 64, "bf16", False), (1, 64, "bf16", True)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT = 0.05


def cases() -> Iterator[Case]:
    for batch, length, label, selective in CASES:
        yield _case(batch, length, label, selective)


def stepper(model: Any, ids: torch.Tensor, lr: float = 1e-4) -> Callable[[], float]:
    """A function that takes a step and returns the loss before it."""
    model.train()
    library = pyqlora.optim if isinstance(model, pyqlora.PeftModel) else torch.optim  # faster than bitsandbytes'
    optimizer = library.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step() -> float:
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _case(batch: int, length: int, label: str, selective: bool) -> Case:
    path = checkpoint(**SMOLLM2_135M)
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))
    models = {name: adapted(name, path, DTYPES[label], 16, DROPOUT, selective) for name in IMPLEMENTATIONS}
    steps = {name: stepper(model, ids) for name, model in models.items()}

    def same_losses():
        """The adapters' products start at 0: the first loss is the base model's."""
        first = {name: step() for name, step in steps.items()}
        error = abs(first["pyqlora"] - first["bitsandbytes"])
        assert error < (1e-4 if label == "fp32" else 2e-2), first
        second = {name: step() for name, step in steps.items()}
        assert all(second[name] < first[name] for name in first), (first, second)

    return Case(f"step {batch}x{length} {label}{', selective' * selective}", steps, same_losses)
