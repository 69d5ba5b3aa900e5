"""Greedy decoding through transformers' generate with an unmerged adapter, SmolLM2-135M's shape, 16 new tokens.

All in float32, and each implementation in the dtype that it is fastest in on a CPU without 16-bit matrix instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case
from benchmarks.models import IMPLEMENTATIONS, SMOLLM2_135M, adapted, as_installed, checkpoint

TOKENS = 16
BEST = {"pyqlora": torch.bfloat16, "bitsandbytes": torch.float32, "torch dense": torch.bfloat16}


def cases() -> Iterator[Case]:
    yield _case(f"decode {TOKENS} tokens fp32", dict.fromkeys(IMPLEMENTATIONS, torch.float32))
    yield _case(f"decode {TOKENS} tokens bf16, bitsandbytes fp32", BEST)


def _case(name: str, dtypes: dict[str, torch.dtype]) -> Case:
    path = checkpoint(**SMOLLM2_135M)
    prompt = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, 8), generator=torch.Generator().manual_seed(2))
    models = {name: adapted(name, path, dtypes[name]).eval() for name in IMPLEMENTATIONS}
    for model in models.values():
        model.config.use_cache = True

    def generate(model):
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )

    def same():
        with torch.no_grad():
            logits = [models[name](input_ids=prompt).logits.float() for name in ("pyqlora", "bitsandbytes")]
        assert (logits[0] - logits[1]).abs().max() < 0.1 * logits[1].abs().max()
        if dtypes["pyqlora"] == dtypes["bitsandbytes"]:
            assert torch.equal(generate(models["pyqlora"]), generate(models["bitsandbytes"]))

    runs = {name: as_installed(name, lambda model=model: generate(model)) for name, model in models.items()}
    return Case(name, runs, same)
