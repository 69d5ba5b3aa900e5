"""AdEMAMix in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer2State


class AdEMAMix(Optimizer2State):
    """AdEMAMix (Pagliardini et al. 2024): Adam with a second, slow average of the gradient.

    With c1 = 1-b1^t and c2 = sqrt(1-b2^t): m1 and m2 average g with b1 and b3, v averages g^2 with b2, and
    p = p (1 - lr weight_decay) - lr (m1/c1 + alpha m2) / (sqrt(v)/c2 + eps). `t_alpha` is the number of steps over
    which alpha grows to its value, `t_beta3` the one over which b3 grows from b1. state1 holds m1 and m2.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999, 0.9999),
        alpha=5.0,
        t_alpha=None,
        t_beta3=None,
        eps=1e-8,
        weight_decay=1e-2,
        optim_bits=32,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            page_dir=page_dir,
        )


class _AdEMAMixOfOneWidth(AdEMAMix):
    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999, 0.9999),
        alpha=5.0,
        t_alpha=None,
        t_beta3=None,
        eps=1e-8,
        weight_decay=1e-2,
        min_8bit_size=4096,
        is_paged=False,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            self.fixed_bits,
            min_8bit_size,
            is_paged,
            page_dir=page_dir,
        )


class AdEMAMix8bit(_AdEMAMixOfOneWidth):
    """AdEMAMix with 8-bit states."""

    fixed_bits = 8


class AdEMAMix32bit(_AdEMAMixOfOneWidth):
    """AdEMAMix with float32 states."""

    fixed_bits = 32


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with its states in a file-backed mapping."""

    paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with 8-bit states in a file-backed mapping."""

    paged = True


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix with float32 states in a file-backed mapping."""

    paged = True
