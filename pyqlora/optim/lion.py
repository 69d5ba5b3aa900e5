"""Lion in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer1State


class Lion(Optimizer1State):
    """Lion (Chen et al. 2023): p = p (1 - lr weight_decay) - lr sign(b1 m + (1-b1) g), m = b2 m + (1-b2) g."""

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.99),
        weight_decay=0,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            page_dir=page_dir,
        )


class _LionOfOneWidth(Lion):
    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.99),
        weight_decay=0,
        args=None,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        super().__init__(
            params, lr, betas, weight_decay, self.fixed_bits, args, min_8bit_size, is_paged, page_dir=page_dir
        )


class Lion8bit(_LionOfOneWidth):
    """Lion with 8-bit states."""

    fixed_bits = 8


class Lion32bit(_LionOfOneWidth):
    """Lion with float32 states."""

    fixed_bits = 32


class PagedLion(Lion):
    """Lion with its states in a file-backed mapping."""

    paged = True


class PagedLion8bit(Lion8bit):
    """Lion with 8-bit states in a file-backed mapping."""

    paged = True


class PagedLion32bit(Lion32bit):
    """Lion with float32 states in a file-backed mapping."""

    paged = True
