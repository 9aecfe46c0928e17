"""supervisord with two changes for unattended operation.

A full disk under its output does not end it, and its children end when it is killed, so that no unwatched
process holds a port. Arguments: those of supervisord.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO

from supervisor import supervisord
from supervisor.options import ServerOptions

__all__ = ["end_with_parent", "main"]

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, also after an exec; Linux only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Options(ServerOptions):  # type: ignore[misc]
    def execve(self, filename: str, argv: list[str], env: dict[str, str]) -> None:
        """Replace a child process by its program."""
        end_with_parent()
        super().execve(filename, argv, env)


class _BestEffortStream:
    """A text stream that drops what it fails to write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str | bytes) -> int:
        """Write text, or a child's output in bytes."""
        with suppress(OSError):
            self._stream.write(text if isinstance(text, str) else text.decode("utf-8", "replace"))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flush."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: list[str]) -> None:
    """Run supervisord in this process until it ends."""
    sys.stdout, sys.stderr = _BestEffortStream(sys.stdout), _BestEffortStream(sys.stderr)
    supervisord.ServerOptions = _Options
    supervisord.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
