"""Faults to plant in the CUDA kernels, a module per .cu file: what its tests, run on the emulated GPU, must notice."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`before` stands exactly once in `file` (under csrc; by default the module's .cu file) and becomes `after`."""

    what: str
    before: str
    after: str
    file: str | None = None
