"""Whether a living process writes a folder: an advisory lock that the system lets go when its holder dies.

The lock is flock's, on a file that stays. A writer holds it alone for as long as it runs. A reader asks for a
shared lock without waiting and lets go at once, so a writer tries for a moment before it believes that
another one writes.

Some file systems keep no locks. A writer then goes on without one, and a reader believes a folder that was
ever held to be held still: a run that is wrongly thought dead invites a second writer, whom nothing would
stop there.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["RunLocked", "hold", "is_held"]

PATIENCE_S = 2.0
"""How long a writer tries: many times what a reader keeps the lock for."""
PAUSE_S = 0.02


class RunLocked(FedSigmaError, RuntimeError):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which is made if it is not there, until the end of the block.

    Raises:
        HeldElsewhere: another writer does.
        OSError: the file cannot be made.
    """
    # Closed when a program is started, so that none of them keeps the lock of a dead holder.
    with path.open("ab") as file:
        _take(file)
        yield


def _take(file: IO[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise RunLocked from None
        except OSError:  # no locks here
            return None
        time.sleep(PAUSE_S)


def is_held(path: Path) -> bool:
    """Whether a living process, this one included, holds the lock of this file; changes nothing."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or there are no locks here
        return True
    return False
