"""Adam in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer2State


class Adam(Optimizer2State):
    """Adam (Kingma & Ba 2015), rules as in bitsandbytes.

    With t the step: m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2,
    p = p (1 - lr weight_decay) - lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + eps sqrt(1-b2^t)).

    The decay is decoupled here too, not only in AdamW, and comes before the update: so does bitsandbytes on a CPU,
    while its CUDA kernels decay after the update.

    Raises:
        ValueError: amsgrad, or an `optim_bits` other than the default where the class fixes the width.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name} does not support amsgrad=True")
        if self.fixed_bits == 8 and optim_bits != 32:
            raise ValueError(f"{name} only supports optim_bits=32 (the default): its states always have 8 bits")
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            is_paged=is_paged,
            page_dir=page_dir,
        )


class Adam8bit(Adam):
    """Adam with 8-bit states."""

    fixed_bits = 8


class Adam32bit(Adam):
    """Adam with float32 states."""

    fixed_bits = 32


class PagedAdam(Adam):
    """Adam with its states in a file-backed mapping."""

    paged = True


class PagedAdam8bit(Adam8bit):
    """Adam with 8-bit states in a file-backed mapping."""

    paged = True


class PagedAdam32bit(Adam32bit):
    """Adam with float32 states in a file-backed mapping."""

    paged = True
