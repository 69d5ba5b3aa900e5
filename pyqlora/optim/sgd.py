"""SGD with momentum in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer1State


def check_momentum(name: str, momentum: float, dampening: float, nesterov: bool) -> None:
    """Refuse what these rules do not have, rather than ignore it."""
    if momentum == 0:
        raise NotImplementedError(f"{name} without momentum is not supported: use torch.optim.SGD, which has no state")
    if dampening or nesterov:
        raise ValueError(f"{name}: expected dampening=0 and nesterov=False, got {dampening} and {nesterov}")


class SGD(Optimizer1State):
    """SGD with momentum: g = g + weight_decay p, m = momentum m + g, p = p - lr m.

    Raises:
        NotImplementedError: momentum is 0.
        ValueError: dampening or nesterov, which bitsandbytes takes and ignores.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        check_momentum(type(self).__name__, momentum, dampening, nesterov)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class _SGDOfOneWidth(SGD):
    def __init__(
        self,
        params,
        lr,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            self.fixed_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class SGD8bit(_SGDOfOneWidth):
    """SGD with 8-bit states."""

    fixed_bits = 8


class SGD32bit(_SGDOfOneWidth):
    """SGD with float32 states."""

    fixed_bits = 32


class PagedSGD(SGD):
    """SGD with its states in a file-backed mapping."""

    paged = True


class PagedSGD8bit(SGD8bit):
    """SGD with 8-bit states in a file-backed mapping."""

    paged = True


class PagedSGD32bit(SGD32bit):
    """SGD with float32 states in a file-backed mapping."""

    paged = True
