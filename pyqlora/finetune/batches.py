"""Which samples make up step i: a function of the seed alone, so a resumed run sees the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyqlora.finetune.encode import IGNORED, Encoded

BUCKET_STEPS = 16  # samples are sorted by length within this many steps, so that batches carry little padding


class Order:
    """The micro-batches of every step, epoch after epoch.

    Args:
        lengths: tokens of each sample.
        batch_size: samples in a micro-batch.
        grad_accum: micro-batches in a step.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, grad_accum: int, seed: int):
        self.lengths, self.batch_size, self.grad_accum, self.seed = lengths, batch_size, grad_accum, seed
        self.steps_per_epoch = math.ceil(len(lengths) / (batch_size * grad_accum))
        self._epoch, self._steps = -1, []

    def step(self, index: int) -> list[list[int]]:
        """The sample indices of step `index`, counted from 0: one list per micro-batch."""
        epoch, within = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._shuffle(epoch)
        return self._steps[within]

    def _shuffle(self, epoch: int) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        bucket = self.batch_size * self.grad_accum * BUCKET_STEPS
        batches = []
        for start in range(0, len(order), bucket):
            by_length = sorted(order[start : start + bucket], key=self.lengths.__getitem__)
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return [mixed[i : i + self.grad_accum] for i in range(0, len(mixed), self.grad_accum)]


def collate(samples: Sequence[Encoded], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids and mask [batch, length], padded on the right; labels [batch, length - 1] of the next token."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        mask[row, : len(sample.ids)] = 1
        labels[row, : len(sample.ids)] = torch.tensor(sample.labels)
    return ids.to(device), mask.to(device), labels[:, 1:].to(device)
