"""A training step of SmolLM2-135M's shape beside bitsandbytes + PEFT and PEFT on the dense model.

LoRA r=16 on all seven projections, dropout 0.05, gradient checkpointing, AdamW. "Each at its best": pyqlora and the
dense model, this by torch's own, checkpoint selectively, which would make bitsandbytes slower. Checked: the losses of
two steps, where both 4-bit models start with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import pyqlora
from benchmarks.harness import Case
from benchmarks.models import IMPLEMENTATIONS, SMOLLM2_135M, adapted, as_installed, checkpoint, loss_of

BEST, PLAIN = ("pyqlora", "torch dense"), ()  # which checkpoint selectively
CASES = [(1, 256, "fp32", BEST), (1, 256, "fp32", PLAIN), (4, 256, "fp32", BEST), (4, 256, "fp32", PLAIN)]
CASES += [(1, 64, "bf16", BEST), (1, 64, "bf16", PLAIN), (4, 256, "bf16", BEST)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DROPOUT = 0.05
MANY = 512  # tokens whose step in bf16 takes minutes where torch multiplies


def cases() -> Iterator[Case]:
    for case in CASES:
        yield _case(*case)


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


def _case(batch: int, length: int, label: str, selective: tuple[str, ...]) -> Case:
    path = checkpoint(**SMOLLM2_135M)
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))
    slow = label == "bf16" and batch * length > MANY
    models = {
        name: adapted(name, path, DTYPES[label], 16, DROPOUT, name in selective)
        for name in IMPLEMENTATIONS[: 2 if slow else 3]
    }
    steps = {name: as_installed(name, stepper(model, ids)) for name, model in models.items()}

    def same_losses():
        """The adapters' products start at 0: the first loss is the base model's."""
        first = {name: step() for name, step in steps.items()}
        error = abs(first["pyqlora"] - first["bitsandbytes"])
        assert error < (1e-4 if label == "fp32" else 2e-2), first
        if slow:
            return
        second = {name: step() for name, step in steps.items()}
        assert all(second[name] < first[name] for name in first), (first, second)

    how = "each at its best" if selective else "plain checkpointing"
    return Case(f"step {batch}x{length} {label}, {how}", steps, same_losses, once=("bitsandbytes",) if slow else ())
