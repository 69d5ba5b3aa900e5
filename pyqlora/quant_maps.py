"""Code tables: the values that 8-bit and smaller codes stand for, in [-1, 1], padded with zeros to 256.

The dynamic map spends its bits on the order of magnitude of small values and on the fraction of large ones
(Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", https://arxiv.org/abs/1511.04561).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

ENTRIES = 256


def _padded(values: list[float]) -> Tensor:
    return torch.tensor(sorted(values + [0.0] * (ENTRIES - len(values))), dtype=torch.float32)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map (float32 [256]): decade i of `max_exponent_bits` holds twice the values of decade i - 1.

    Raises:
        ValueError: the decades do not add up to 2**total_bits values.
    """
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]

    def decade(i: int, count: int) -> None:
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10 ** (i - (max_exponent_bits - 1))
        values.extend((scale * means).tolist())
        if signed:
            values.extend((-scale * means).tolist())

    for i in range(max_exponent_bits):
        decade(i, int(2 ** (i + fraction_bits + (0 if signed else 1))))
    if fraction_bits > 0:
        decade(max_exponent_bits - 1, 2**fraction_bits - 1)
    if len(values) != 2**total_bits:
        raise ValueError(
            f"create_dynamic_map: signed={signed}, max_exponent_bits={max_exponent_bits} gives {len(values)} values, "
            f"total_bits={total_bits} needs {2**total_bits}"
        )
    return _padded(values)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values (float32 [256]), padded in the middle; a signed map below 8 bits always has its zero."""
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count, device="cpu")
    return torch.cat([values[: count // 2], values.new_zeros(ENTRIES - count), values[count // 2 :]])


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """NormalFloat (float32 [256]): quantiles of N(0, 1) from `offset` to the middle, scaled to a maximum of 1.

    Eight positive and seven negative values with `use_extra_value`, else seven of each
    (Dettmers et al., "QLoRA", https://arxiv.org/abs/2305.14314).
    """

    def quantiles(count: int) -> list[float]:
        p = torch.linspace(offset, 0.5, count + 1, device="cpu")[:-1]
        return torch.special.ndtri(p.double()).tolist()

    values = quantiles(8 if use_extra_value else 7) + [-q for q in quantiles(7)]
    table = _padded(values)
    return table / table.max()


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """A small floating-point format (float32 [256]), its values divided by the largest.

    Raises:
        ValueError: the bits do not add up to `total_bits`.
    """
    if exponent_bits + precision_bits != total_bits - signed:
        raise ValueError(
            f"create_fp8_map: sign, exponent_bits and precision_bits must add up to total_bits = {total_bits}, "
            f"got {int(signed)} + {exponent_bits} + {precision_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent, bits in product(range(2**exponent_bits), product((0, 1), repeat=precision_bits)):
        fraction = sum(bit * 2.0 ** -(i + 1) for i, bit in enumerate(bits))
        value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        values += [value, -value] if signed else [value]
    table = _padded(values)
    return table / table.max()
