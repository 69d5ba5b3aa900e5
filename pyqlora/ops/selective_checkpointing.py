"""Gradient checkpointing that repeats a block's forward pass without its matrix products: `selective_checkpointing`.

Most of a block's time goes to its linear layers, but most of what checkpointing saves is not their outputs: a Llama
block holds as much again for its norms, rotations, activation functions and attention. So the outputs of the layers on
4-bit weights stay, and everything else is computed again from them.

The output of the last layer does not stay. torch ends the repeated pass at the last tensor that is saved for the
gradients, which is one of this layer's own; its output is for the next block. So the layer hands out memory without
values, and if the pass goes on nevertheless they are computed, and stay from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Result = tuple[Tensor | None, ...]
_threads = threading.local()  # `current`: the pass that this thread is in
_needed: set[object] = set()  # layers whose outputs were computed again though they were a block's last


class _Block:
    """The results of a checkpointed block's layers, in the order of their calls."""

    def __init__(self) -> None:
        self.results: list[tuple | None] = []

    def record(self, key: tuple, result: Result, late: bool) -> Result:
        # Not the tensors themselves, whose graph would hold this block; versions tell whether they are written to.
        kept = [part if part is None else (part.detach(), part._version) for part in result]
        self.results.append((key, kept, late))
        return result

    def end(self) -> None:
        """Let go of the last result's first part if it can come late."""
        if self.results:
            key, kept, late = self.results[-1]
            if late and key[0] not in _needed:
                self.results[-1] = key, [None, *kept[1:]], late

    def take(self, position: int, key: tuple) -> Result | None:
        """The result of a call, once; None if it is gone, is that of another layer or was overwritten."""
        if position >= len(self.results) or self.results[position] is None:
            return None
        (its_key, kept, _), self.results[position] = self.results[position], None
        if its_key != key or any(part and part[0]._version != part[1] for part in kept):
            return None
        return tuple(part and part[0] for part in kept)


class _Pass:
    """The context in which a block is computed: in its `first` pass results are recorded, later they are taken."""

    def __init__(self, block: _Block, first: bool):
        self.block, self.first, self.position = block, first, 0
        self.missing: tuple | None = None  # the call whose result's first part has no values yet

    def __enter__(self) -> None:
        self.position, self.outer = 0, getattr(_threads, "current", None)
        _threads.current = self

    def __exit__(self, *_: object) -> None:
        _threads.current, self.missing = self.outer, None
        if self.first:
            self.block.end()

    def result(self, key: tuple, compute: Callable[[], Result], late: bool) -> Result:
        if self.first:
            return self.block.record(key, compute(), late)
        taken = self.block.take(self.position, key)
        self.position += 1
        if late and taken is not None and taken[0] is None:
            self.missing = key, compute
        return compute() if taken is None else taken


def selective_checkpointing() -> tuple[_Pass, _Pass]:
    """The `context_fn` of torch.utils.checkpoint for blocks whose layers on 4-bit weights are not to run twice.

    transformers and prepare_model_for_kbit_training pass it on, where checkpointing is not reentrant:

        kwargs = {"use_reentrant": False, "context_fn": pyqlora.selective_checkpointing}
        model = pyqlora.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)

    The Trainer then leaves it as it is, unless its arguments ask for checkpointing themselves; a function among those
    is not JSON, which some of its loggers want.

    Losses and gradients are those of plain checkpointing, to the bit. A layer's output stays until the backward pass
    takes it: in a Llama of hidden size d, intermediate size i and k key-value dimensions 2·d + 2·k + 2·i numbers for
    each token and block, d more on a CPU for attention's, beside the d of plain checkpointing. Dense layers run
    twice as ever.

    Returns:
        The contexts for a block's first and for its repeated forward pass.
    """
    block = _Block()
    return _Pass(block, first=True), _Pass(block, first=False)


def keeping() -> bool:
    """Whether what is computed now may be kept, so that it must not be written to."""
    return getattr(_threads, "current", None) is not None


def kept(key: tuple, compute: Callable[[], Result], late: bool = False) -> Result:
    """What `compute` returns, from the block's first pass where it was kept.

    Args:
        key: tells the calls apart; its first element the layers.
        compute: gives the result.
        late: the first part may be None. The caller then takes memory for it, and `completed` writes it there, once all
            that autograd is to keep of the call was saved.
    """
    current = getattr(_threads, "current", None)
    return compute() if current is None else current.result(key, compute, late)


def completed(y: Tensor) -> Tensor:
    """y, the first part of the last result, with the values that were to come late."""
    current = getattr(_threads, "current", None)
    if current is not None and current.missing is not None:
        (key, compute), current.missing = current.missing, None
        with torch.no_grad():
            y.data.copy_(compute()[0])
        _needed.add(key[0])
    return y
