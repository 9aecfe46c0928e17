"""Memory that a process has freed and still holds."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

__all__ = ["give_back"]


def give_back() -> None:
    """Return to the system what has been freed, where the C library can do so (glibc).

    glibc keeps freed blocks of up to 32 MB for later, which after a training step are gigabytes. A site that
    waits for the next round, or a simulation's actor whose turn it is not, does not need them.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library to ask, as on Windows
        return None
