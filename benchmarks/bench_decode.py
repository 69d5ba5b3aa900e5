"""Greedy decoding through transformers' generate with an unmerged adapter, SmolLM2-135M's shape, 16 new tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case
from benchmarks.models import IMPLEMENTATIONS, SMOLLM2_135M, adapted, checkpoint

TOKENS = 16


def cases() -> Iterator[Case]:
    path = checkpoint(**SMOLLM2_135M)
    prompt = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, 8), generator=torch.Generator().manual_seed(2))
    runs = {}
    for name in IMPLEMENTATIONS:
        model = adapted(name, path, torch.float32).eval()
        model.config.use_cache = True
        runs[name] = lambda model=model: model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )

    def same_tokens():
        ours, peers = runs["pyqlora"](), runs["bitsandbytes"]()
        assert ours.shape == peers.shape == (1, 8 + TOKENS) and torch.equal(ours, peers)

    yield Case(f"decode {TOKENS} tokens fp32", runs, same_tokens)
