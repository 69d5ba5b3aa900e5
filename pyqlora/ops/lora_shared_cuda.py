"""h = scale · x·Aᵀ for projections that read one x (q, k and v; gate and up), from one pass over it.

Nobody names such projections: a factor that is asked for with the same x as the one before it is remembered as that
one's follower, and the next time the leader is asked for, the followers' products are computed with it and wait until
each is asked for. One that was not asked for before another x came is forgotten. A factor's bits are the same alone and
in company (`lora_linear_cuda.down`), so that nothing but the number of launches and of passes over x depends on this.

The same x is the same tensor, unchanged since by autograd's version counter, on the same stream; a follower's product
also holds for the factor, its version, memory and scale that it was computed with. What waits is dropped with x, which
is not kept alive. Every thread has its own. Not while a CUDA graph is captured, nor in inference mode, where tensors
have no version.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.nn import Parameter

from pyqlora.ops import lora_linear_cuda as kernels
from pyqlora.ops.backend import native


class _Pass:
    """The pass over x that a leader began."""

    def __init__(self, x: Tensor, state: tuple, leader: _Leader):
        self.products: dict[int, tuple[weakref.ref, tuple, Tensor]] = {}  # by id: the follower, what must hold of it
        self.expected: set[int] = set()  # ids of the followers that were not asked for yet
        products = self.products
        self.x, self.state = weakref.ref(x, lambda _: products.clear()), state
        self.leader = leader

    def covers(self, x: Tensor, state: tuple) -> bool:
        return self.x() is x and self.state == state


class _Leader:
    """A factor that began a pass, and who asked for the same x after it."""

    def __init__(self, factor: Tensor, leaders: dict[int, _Leader]):
        key = id(factor)
        self.factor = weakref.ref(factor, lambda _: leaders.pop(key, None))
        self.followers: dict[int, tuple[weakref.ref, float]] = {}  # by id, with their scales


class _Thread(threading.local):
    def __init__(self):
        self.current: _Pass | None = None
        self.leaders: dict[int, _Leader] = {}  # by id


_thread = _Thread()


def _state(x: Tensor) -> tuple:
    return x._version, native(x)[1]


def _identity(a: Tensor, scale: float) -> tuple:
    return a._version, a.data_ptr(), a.dtype, a.shape, scale


def _can_share(x: Tensor, a: Tensor) -> bool:
    # A wrapper of parameters that are gathered and released (FSDP's) makes them anew or of other types.
    return (
        type(a) is Parameter and not x.is_inference() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def down(x: Tensor, a: Tensor, scale: float, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """scale · drop(x)·Aᵀ [M, r] of x [..., K] and a factor A [r, K], as `lora_linear_cuda.down` computes it.

    Nothing is shared under dropout, where every projection has a mask of its own.
    """
    if seed is not None or not _can_share(x, a):
        return kernels.down(x, [a], [scale], seed, dropout)[0]
    current, state = _thread.current, _state(x)
    if current is None or not current.covers(x, state) or current.leader.factor() is a:
        return _lead(x, state, a, scale)
    current.expected.discard(id(a))
    if (found := current.products.pop(id(a), None)) is not None:
        follower, identity, product = found
        if follower() is a and identity == _identity(a, scale):
            return product
    current.leader.followers[id(a)] = weakref.ref(a), scale
    return kernels.down(x, [a], [scale])[0]


def _lead(x: Tensor, state: tuple, a: Tensor, scale: float) -> Tensor:
    """A new pass, with the followers of `a`."""
    if (before := _thread.current) is not None:
        for missed in before.expected:
            before.leader.followers.pop(missed, None)
    leaders = _thread.leaders
    leader = leaders.get(id(a)) or leaders.setdefault(id(a), _Leader(a, leaders))
    current = _thread.current = _Pass(x, state, leader)
    if not leader.followers:
        return kernels.down(x, [a], [scale])[0]
    shared = [(a, scale)]
    for follower, its_scale in leader.followers.values():
        factor = follower()
        if factor is not None and _fits(factor, a) and len(shared) < kernels.MAX_ADAPTERS:
            shared.append((factor, its_scale))
    own, *others = kernels.down(x, *map(list, zip(*shared, strict=True)))
    for (factor, its_scale), product in zip(shared[1:], others, strict=True):
        current.expected.add(id(factor))
        current.products[id(factor)] = weakref.ref(factor), _identity(factor, its_scale), product
    return own


def _fits(factor: Tensor, a: Tensor) -> bool:
    """Whether one launch takes both; not what is offloaded or released at the moment."""
    same = factor.dtype == a.dtype and factor.device == a.device and factor.shape[1:] == a.shape[1:]
    return same and factor.is_contiguous() and factor.data_ptr() != 0
