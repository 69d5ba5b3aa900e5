"""A conversation with a model, under one of its adapters or none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer


class Speed(NamedTuple):
    """What an answer took: tokens, seconds to the first, seconds in all."""

    tokens: int
    first: float
    seconds: float

    def __str__(self) -> str:
        rest = self.seconds - self.first
        rate = f", {(self.tokens - 1) / rest:.1f} tok/s" if self.tokens > 1 and rest > 0 else ""
        return f"({self.tokens} tokens{rate}, the first after {self.first:.1f} s)"


class Stream(TextStreamer):
    """Hands out an answer word by word, and counts its tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.tokens, self.first = write, 0, 0.0
        self.start = time.perf_counter()
        self.text = ""

    def put(self, value: Any) -> None:
        """Token ids, first the prompt's."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            self.first = self.first or time.perf_counter() - self.start
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that no further token changes."""
        text = text if self.text else text.lstrip()
        self.text += text
        self.write(text)

    def speed(self) -> Speed:
        """What it took until now."""
        return Speed(self.tokens, self.first, time.perf_counter() - self.start)


class Conversation:
    """Messages and answers, and the adapter that answers.

    Args:
        model: a causal language model, a PeftModel if there are adapters.
        tokenizer: with a chat template, unless `plain`.
        names: the adapters' names; the first one answers.
        plain: complete each message as text, without template or memory.
        max_new_tokens: length of an answer at most.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: see transformers' GenerationConfig.
        seed: of sampling.

    Raises:
        ValueError: a tokenizer without a chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: list[str],
        plain: bool = False,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        if not plain and tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: use --plain to complete text")
        self.model, self.tokenizer, self.names, self.plain = model.eval(), tokenizer, names, plain
        self.max_new_tokens = max_new_tokens
        self.sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if seed is not None:
            torch.manual_seed(seed)
        self.active: str | None = None
        self.messages: list[dict[str, str]] = []
        self.last: list[dict[str, str]] = []  # what the last answer was an answer to
        if names:
            self.use(names[0])

    def use(self, name: str) -> None:
        """Answer with an adapter, or with "base" without one.

        Raises:
            ValueError: no such adapter.
        """
        if name not in (*self.names, "base"):
            raise ValueError(f"no adapter {name!r}, there are: {', '.join((*self.names, 'base'))}")
        self.active = None if name == "base" else name
        if self.active is not None:
            self.model.set_adapter(name, inference_mode=True)

    def clear(self) -> None:
        """Forget all messages."""
        self.messages, self.last = [], []

    def answer(self, message: str, write: Callable[[str], None]) -> Speed:
        """Answer a message, piece by piece through `write`; an interrupted answer leaves the conversation as it was."""
        question = {"role": "user", "content": message}
        asked = [question] if self.plain else self._fitting([*self.messages, question])
        self.last = asked
        stream = self._generate(asked, write, self.active is None)
        if not self.plain:
            self.messages = [*asked, {"role": "assistant", "content": stream.text}]
        return stream.speed()

    def answer_as_base(self, write: Callable[[str], None]) -> Speed:
        """Answer the last message without an adapter; the conversation goes on with the answer it had.

        Raises:
            ValueError: there is no last message.
        """
        if not self.last:
            raise ValueError("/base answers your last message without an adapter; there is none yet")
        return self._generate(self.last, write, base=True).speed()

    @torch.inference_mode()
    def _generate(self, messages: list[dict[str, str]], write: Callable[[str], None], base: bool) -> Stream:
        stream = Stream(self.tokenizer, write)
        device = next(self.model.parameters()).device
        ids = torch.tensor([self._ids(messages)], device=device)
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        with self.model.disable_adapter() if base and self.names else contextlib.nullcontext():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                streamer=stream,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=sorted(ends) or None,
                **self.sampling,
            )
        return stream

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.plain:
            return self.tokenizer(messages[-1]["content"])["input_ids"]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _fitting(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages without the oldest ones that leave no room for an answer in the model's context.

        Raises:
            ValueError: the last message alone is too long.
        """
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while context is not None and (length := len(self._ids(messages))) >= context:
            if len(messages) == 1:
                raise ValueError(f"the message has {length} tokens, and the model reads {context} at most")
            messages = messages[2:]
        return messages
