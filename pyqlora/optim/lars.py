"""LARS in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer1State
from pyqlora.optim.sgd import check_momentum


class LARS(Optimizer1State):
    """LARS (You et al. 2017): SGD with momentum whose update is no longer than `max_unorm` |p|, tensor by tensor.

    With 8-bit states the limit does not apply, as in bitsandbytes.

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
        max_unorm=0.02,
        *,
        page_dir=None,
    ):
        check_momentum(type(self).__name__, momentum, dampening, nesterov)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            page_dir=page_dir,
        )


class _LARSOfOneWidth(LARS):
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
        max_unorm=0.02,
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
            max_unorm,
            page_dir=page_dir,
        )


class LARS8bit(_LARSOfOneWidth):
    """LARS with 8-bit states."""

    fixed_bits = 8


class LARS32bit(_LARSOfOneWidth):
    """LARS with float32 states."""

    fixed_bits = 32


class PagedLARS(LARS):
    """LARS with its states in a file-backed mapping."""

    paged = True


class PagedLARS8bit(LARS8bit):
    """LARS with 8-bit states in a file-backed mapping."""

    paged = True


class PagedLARS32bit(LARS32bit):
    """LARS with float32 states in a file-backed mapping."""

    paged = True
