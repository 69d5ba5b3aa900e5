"""adapter_names=[…]: every row of a batch with its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

BASE_ROW = "__base__"  # the name in adapter_names for rows without an adapter


class RowAdapters(NamedTuple):
    """One adapter's name for each row of the batch; in beam search the decoder sees every row `beams` times."""

    names: list[str]
    beams: int = 1


# Set while PeftModel.forward(adapter_names=…) runs. A context variable and not a field of the layers: several threads
# may serve different adapters from one model.
_rows: ContextVar[RowAdapters | None] = ContextVar("row_adapters", default=None)
_used = False  # by any call yet: what torch.compile can watch, which cannot read a context variable


@contextmanager
def serving(rows: RowAdapters) -> Iterator[None]:
    """While open, every row of a batch runs with its own adapter in this thread."""
    global _used
    _used = True
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def served_rows() -> RowAdapters | None:
    """The adapters of the rows, where the active adapters do not serve all of them."""
    return _rows.get() if _used else None


def names_of_rows(batch: int, given: list[str] | None) -> list[str] | None:
    """The adapter of each row of a batch of that size, or None if the active adapters serve all rows.

    Raises:
        ValueError: the count of names is not the batch size.
    """
    rows = served_rows() if given is None else RowAdapters(given)
    if rows is None:
        return None
    if rows.beams > 1 and batch == len(rows.names) * rows.beams:
        return [name for name in rows.names for _ in range(rows.beams)]
    if batch != len(rows.names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(rows.names)} and {batch} respectively."
        )
    return list(rows.names)
