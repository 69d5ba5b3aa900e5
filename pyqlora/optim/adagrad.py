"""Adagrad in 32 and 8 bits, paged or not."""

from __future__ import annotations

from pyqlora.optim.optimizer import Optimizer1State


class Adagrad(Optimizer1State):
    """Adagrad (Duchi et al. 2011): g = g + weight_decay p, v = v + g^2, p = p - lr g / (sqrt(v) + eps).

    Raises:
        ValueError: lr_decay or initial_accumulator_value other than 0; an `optim_bits` that the class does not have.
    """

    def __init__(
        self,
        params,
        lr=1e-2,
        lr_decay=0,
        weight_decay=0,
        initial_accumulator_value=0,
        eps=1e-10,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        name = type(self).__name__
        if initial_accumulator_value != 0.0:
            raise ValueError(f"{name}: expected initial_accumulator_value=0, got {initial_accumulator_value}")
        if lr_decay != 0.0:
            raise ValueError(f"{name}: expected lr_decay=0, got {lr_decay}")
        if self.fixed_bits == 8 and optim_bits != 8:
            raise ValueError(f"{name} only supports optim_bits=8 (the default): its states always have 8 bits")
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states."""

    fixed_bits = 8

    def __init__(
        self,
        params,
        lr=1e-2,
        lr_decay=0,
        weight_decay=0,
        initial_accumulator_value=0,
        eps=1e-10,
        optim_bits=8,
        args=None,
        min_8bit_size=4096,
        *,
        page_dir=None,
    ):
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
            page_dir=page_dir,
        )


class Adagrad32bit(Adagrad):
    """Adagrad with float32 states."""

    fixed_bits = 32


class PagedAdagrad(Adagrad):
    """Adagrad with its states in a file-backed mapping."""

    paged = True


class PagedAdagrad8bit(Adagrad8bit):
    """Adagrad with 8-bit states in a file-backed mapping."""

    paged = True


class PagedAdagrad32bit(Adagrad32bit):
    """Adagrad with float32 states in a file-backed mapping."""

    paged = True
