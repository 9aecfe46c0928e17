"""Ending with one's parent, so that no process is left that nobody watches."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends; it holds over an exec.

    Only Linux can; elsewhere nothing happens, and a killed parent leaves its children.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
