"""RMSprop in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer1State


class RMSprop(Optimizer1State):
    """RMSprop: g = g + weight_decay p, v = alpha v + (1-alpha) g^2, p = p - lr g / (sqrt(v) + eps).

    Raises:
        NotImplementedError: alpha is 0, or centered.
        ValueError: momentum, which bitsandbytes takes and ignores.
    """

    def __init__(
        self,
        params,
        lr=1e-2,
        alpha=0.99,
        eps=1e-8,
        weight_decay=0,
        momentum=0,
        centered=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        name = type(self).__name__
        if alpha == 0:
            raise NotImplementedError(f"{name} with alpha=0 is not supported")
        if centered:
            raise NotImplementedError(f"{name} with centered=True is not supported")
        if momentum:
            raise ValueError(f"{name}: expected momentum=0, got {momentum}")
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class _RMSpropOfOneWidth(RMSprop):
    def __init__(
        self,
        params,
        lr=1e-2,
        alpha=0.99,
        eps=1e-8,
        weight_decay=0,
        momentum=0,
        centered=False,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            self.fixed_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class RMSprop8bit(_RMSpropOfOneWidth):
    """RMSprop with 8-bit states."""

    fixed_bits = 8


class RMSprop32bit(_RMSpropOfOneWidth):
    """RMSprop with float32 states."""

    fixed_bits = 32


class PagedRMSprop(RMSprop):
    """RMSprop with its states in a file-backed mapping."""

    paged = True


class PagedRMSprop8bit(RMSprop8bit):
    """RMSprop with 8-bit states in a file-backed mapping."""

    paged = True


class PagedRMSprop32bit(RMSprop32bit):
    """RMSprop with float32 states in a file-backed mapping."""

    paged = True
