"""An advisory lock on a run folder, which the system releases when the process that holds it dies.

The lock is flock's, on a file that stays. A reader briefly takes a shared lock to ask whether a writer holds
it, so a writer tries for a moment before it concludes that there is another one.

Some file systems have no locks. A writer then works without one, and a reader assumes that a folder which was
ever locked still is: a run that is wrongly considered dead invites a second writer, whom nothing stops there.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["Timeout", "acquire", "is_locked"]

PATIENCE_S = 2.0
"""How long a writer tries, in seconds: many times as long as a reader holds the lock."""
PAUSE_S = 0.02
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def acquire(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if it is missing, until the end of the block.

    Raises:
        Timeout: Another writer holds it.
        OSError: The file cannot be created.
    """
    lock = FileLock(path, timeout=PATIENCE_S)
    try:
        lock.acquire(poll_interval=PAUSE_S)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a living process, this one included, holds the lock of a file; changes nothing.

    A `FileLock` would create the file, and could not ask where the reader may not write.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # it is locked, or the file system has no locks
        return True
    return False
