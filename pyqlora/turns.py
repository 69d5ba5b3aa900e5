"""Threads that change adapters take turns; those that run the model go on meanwhile.

From several threads, one model may serve different adapters at once with `model(…, adapter_names=[…])` and
`generate`: which adapter a row has is kept in the thread's own context. Other threads may load, add and delete further
adapters at the same time. What is set for the model as a whole (set_adapter, disable_adapter, merging, hot swapping)
holds for all threads: do that while none runs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

# Of all models: a lock in the model itself would keep it from being copied and pickled.
_changing = threading.RLock()


def in_turn(method: Callable) -> Callable:
    """The method, run by one thread at a time."""

    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _changing:
            return method(*args, **kwargs)

    return alone
