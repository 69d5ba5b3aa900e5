"""LAMB in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer2State


class LAMB(Optimizer2State):
    """LAMB (You et al. 2020): Adam whose update m / (sqrt(v) + eps) is no longer than `max_unorm` |p|, by tensor.

    With 8-bit states the limit does not apply, as in bitsandbytes.

    Raises:
        ValueError: amsgrad, bias_correction=False or adam_w_mode=False, which bitsandbytes takes and ignores.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        adam_w_mode=True,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        max_unorm=1.0,
        *,
        page_dir=None,
    ):
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name} does not support amsgrad=True")
        if not bias_correction or not adam_w_mode:
            raise ValueError(f"{name} only supports bias_correction=True and adam_w_mode=True")
        if self.fixed_bits == 8 and max_unorm != 1.0:
            raise ValueError(f"{name} only supports max_unorm=1.0 (the default): 8-bit states go without the limit")
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm,
            page_dir=page_dir,
        )


class _LAMBOfOneWidth(LAMB):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0,
        amsgrad=False,
        adam_w_mode=True,
        args=None,
        min_8bit_size=4096,
        max_unorm=1.0,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            self.fixed_bits,
            args,
            min_8bit_size,
            max_unorm,
            page_dir=page_dir,
        )


class LAMB8bit(_LAMBOfOneWidth):
    """LAMB with 8-bit states."""

    fixed_bits = 8


class LAMB32bit(_LAMBOfOneWidth):
    """LAMB with float32 states."""

    fixed_bits = 32


class PagedLAMB(LAMB):
    """LAMB with its states in a file-backed mapping."""

    paged = True


class PagedLAMB8bit(LAMB8bit):
    """LAMB with 8-bit states in a file-backed mapping."""

    paged = True


class PagedLAMB32bit(LAMB32bit):
    """LAMB with float32 states in a file-backed mapping."""

    paged = True
