"""Loss on token batches, greedy completions, and the scores of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyqlora.finetune.batches import collate
from pyqlora.finetune.encode import IGNORED, Encoded
from pyqlora.integrations.causal_lm import causal_lm_loss

EVAL_TOKENS = 2048  # tokens in one evaluation batch, padding included


def loss_sum(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the labelled tokens.

    Args:
        model: a causal language model.
        ids: input ids [batch, length].
        mask: 1 where `ids` is no padding [batch, length].
        labels: the token after each of the first length - 1 positions, or IGNORED [batch, length - 1].

    Logits exist in chunks, and only of labelled positions: with a large vocabulary all of them would be the largest
    tensor of a step.
    """
    inputs = {"input_ids": ids, "use_cache": False}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
    return causal_lm_loss(model, pad(labels, (1, 0), value=IGNORED), num_items_in_batch=1, **inputs)


@torch.no_grad()
def mean_loss(model: Any, samples: Sequence[Encoded], pad_token_id: int) -> float:
    """Mean cross-entropy per trained token, in nats; its exponential is the perplexity."""
    model.eval()
    device = next(model.parameters()).device
    order = sorted(samples, key=lambda sample: -len(sample.ids))
    total, start = 0.0, 0
    while start < len(order):
        end = start + max(1, EVAL_TOKENS // len(order[start].ids))
        total += float(loss_sum(model, *collate(order[start:end], pad_token_id, device)))
        start = end
    return total / sum(sample.trained for sample in samples)


@torch.no_grad()
def complete(model: Any, prompts: Sequence[list[int]], tokenizer: Any, max_new_tokens: int) -> list[str]:
    """Greedy completions of tokenized prompts, all in one batch padded on the left."""
    model.eval()
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions from a to b (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_accuracy(texts: Sequence[str], expected: Sequence[str]) -> float:
    """1 - edit distance / characters expected, over all pairs and not below 0 for any."""
    right = sum(max(0, len(b) - edit_distance(a, b)) for a, b in zip(texts, expected, strict=True))
    return right / sum(map(len, expected))
