"""Samples to token ids and labels: loss on completions and assistant turns only, truncation counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyqlora.finetune.data import Sample

IGNORED = -100  # torch's cross_entropy ignore_index

# For a base model without a chat template; saved with the adapter's tokenizer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one sample; labels are the ids, or IGNORED where the token is not trained."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Number of tokens that the loss counts: every labelled one but a first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt(self) -> list[int]:
        """The ids before the first trained token."""
        return self.ids[: self._first()]

    @property
    def completion(self) -> list[int]:
        """The ids of the first trained span."""
        first = self._first()
        end = next((i for i in range(first, len(self.ids)) if self.labels[i] == IGNORED), len(self.ids))
        return self.ids[first:end]

    def _first(self) -> int:
        return next(i for i, label in enumerate(self.labels) if i > 0 and label != IGNORED)


@dataclass
class Encoding:
    """The encoded samples, and what happened to the others."""

    samples: list[Encoded] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    truncated: int = 0
    read: int = 0


def encode(samples: Sequence[Sample], tokenizer: Any, max_length: int) -> Encoding:
    """Tokenize samples, cut them to `max_length` tokens, and keep those with a trained token left.

    Text is joined with end-of-text tokens and cut into blocks of max_length.

    Raises:
        ValueError: no sample is left; the message counts the reasons.
    """
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    result = Encoding(read=len(samples))
    if samples and samples[0].text is not None:
        result.samples = _blocks(samples, tokenizer, max_length)
        if not result.samples:
            result.dropped["fewer than two tokens"] += len(samples)
    else:
        for sample in samples:
            _add(result, sample, tokenizer, max_length)
    if not result.samples:
        reasons = "; ".join(f"{count} {reason}" for reason, count in result.dropped.items())
        raise ValueError(f"no sample is left to train on: {reasons}")
    return result


def _add(result: Encoding, sample: Sample, tokenizer: Any, max_length: int) -> None:
    text, spans = _chat_spans(sample, tokenizer) if sample.messages else _completion_span(sample, tokenizer)
    if not spans:
        result.dropped["without an assistant turn" if sample.messages else "with an empty completion"] += 1
        return
    encoded = _label(text, spans, tokenizer)
    if len(encoded.ids) > max_length:
        encoded = Encoded(encoded.ids[:max_length], encoded.labels[:max_length])
        result.truncated += 1
        if encoded.trained == 0:
            result.dropped[f"with no trained token within --max-length {max_length}"] += 1
            result.truncated -= 1
            return
    if encoded.trained == 0:
        result.dropped["with no trained token"] += 1
        return
    result.samples.append(encoded)


def _completion_span(sample: Sample, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    if not sample.completion:
        return "", []
    prompt = (tokenizer.bos_token if _begins_with_bos(tokenizer) else "") + sample.prompt
    text = prompt + sample.completion + (tokenizer.eos_token or "")
    return text, [(len(prompt), len(text))]


def _chat_spans(sample: Sample, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the character range of each assistant turn.

    A turn's range is what the template adds to the generation prompt. Turns that a template rewrites once more
    messages follow (reasoning that is cut from history) are left out.
    """

    def render(messages: list[dict], prompt: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            raise ValueError(f"{sample.where}: the model's chat template refuses these messages: {error}") from error

    text, spans = render(sample.messages), []
    for index, message in enumerate(sample.messages):
        if message["role"] != "assistant":
            continue
        before = render(sample.messages[:index], prompt=True) if index else ""
        after = render(sample.messages[: index + 1]).rstrip()
        if text.startswith(before) and text.startswith(after) and len(before) < len(after):
            spans.append((len(before), len(after)))
    return text, spans


def _label(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> Encoded:
    """Token ids of the text; a token is trained where it begins inside a span, or reaches into one."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    trained = [any(start < last and end > first for first, last in spans) for start, end in offsets]
    return Encoded(list(ids), [token if keep else IGNORED for token, keep in zip(ids, trained, strict=True)])


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts its beginning-of-text token before plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _blocks(samples: Sequence[Sample], tokenizer: Any, max_length: int) -> list[Encoded]:
    stream: list[int] = []
    first = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    for sample in samples:
        stream += first + tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [Encoded(block, block) for block in blocks if len(block) > 1]
