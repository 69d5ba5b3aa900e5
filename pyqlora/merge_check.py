"""What merging changed: logits of the merged model against those of the unmerged one, on a few prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pyqlora import dense

if TYPE_CHECKING:
    from pyqlora.tuner import LoraModel

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time there was a miller who had three sons, a mill and",
    "Water boils at 100 degrees Celsius; expressed in Fahrenheit that is",
)


class MergeCheck(NamedTuple):
    """How far a merged model is from the unmerged one.

    Attributes:
        largest: the largest difference of two logits.
        reach: the largest logit of the unmerged model, by magnitude.
        agreement: the share of positions where both have the same most likely token.
        tokens: positions compared.
    """

    largest: float
    reach: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.3g} (logits reach {self.reach:.3g}), "
            f"top-1 agreement {self.agreement:.1%} of {self.tokens} tokens"
        )


@torch.no_grad()
def logits(model: nn.Module, tokenizer: Any) -> list[Tensor]:
    """The model's logits for each of the prompts, float32 [tokens, vocabulary] on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        outputs = [model(**tokenizer(text, return_tensors="pt").to(device)).logits for text in PROMPTS]
    finally:
        model.train(training)
    return [output[0].float().cpu() for output in outputs]


def compare(before: list[Tensor], after: list[Tensor]) -> MergeCheck:
    """The check of a merged model's logits against the unmerged one's."""
    same = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in zip(before, after, strict=True))
    tokens = sum(len(x) for x in before)
    largest = max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True))
    return MergeCheck(largest, max(float(x.abs().max()) for x in before), same / tokens, tokens)


def tokenizer_at_hand(model: nn.Module) -> Any:
    """The tokenizer of a 4-bit causal language model, if it lies on this machine where the model came from."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel) or not model.can_generate():
        return None
    if model.config.is_encoder_decoder or not any(dense.is_4bit(module) for module in model.modules()):
        return None
    path = model.name_or_path
    if path.endswith(".gguf"):
        from pyqlora.integrations.gguf import GGUFFile
        from pyqlora.integrations.gguf_tokenizer import load_tokenizer

        return load_tokenizer(GGUFFile(path))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True) if path else None
    except (OSError, ValueError):  # there is none
        return None


@contextmanager
def checked(tuner: LoraModel, adapter_names: list[str] | None = None) -> Iterator[None]:
    """Around a merge: compares before and after, and prints the check to stderr, where a tokenizer is at hand.

    Args:
        tuner: the LoraModel; nothing is done if some adapter is merged already.
        adapter_names: the adapters that will be merged; None for the active ones.
    """
    merged = any(layer.merged for layer in tuner.lora_layers())
    tokenizer = None if merged else tokenizer_at_hand(tuner.model)
    if tokenizer is None:
        yield
        return
    active = tuner.active_adapters
    tuner.set_adapter(active if adapter_names is None else adapter_names, inference_mode=True)
    before = logits(tuner.model, tokenizer)
    tuner.set_adapter(active, inference_mode=True)
    yield
    print(f"merge check: {compare(before, logits(tuner.model, tokenizer))}", file=sys.stderr)
