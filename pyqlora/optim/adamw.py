"""AdamW: Adam with decoupled weight decay, in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.adam import Adam


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019): Adam here, with a weight decay by default."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            optim_bits,
            args,
            min_8bit_size,
            is_paged,
            page_dir=page_dir,
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""

    fixed_bits = 8


class AdamW32bit(AdamW):
    """AdamW with float32 states."""

    fixed_bits = 32


class PagedAdamW(AdamW):
    """AdamW with its states in a file-backed mapping."""

    paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW with 8-bit states in a file-backed mapping."""

    paged = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW with float32 states in a file-backed mapping."""

    paged = True
