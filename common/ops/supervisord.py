"""supervisord, with two weaknesses less.

A full disk on which its own output lies must not end it, and its own end must not leave processes that nobody
watches and that hold their ports. Arguments: those of supervisord.
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
    """Have the kernel send this process SIGTERM when its parent ends; it holds over an exec.

    Only Linux can; elsewhere nothing happens, and a killed parent leaves its children.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Options(ServerOptions):
    def execve(self, filename: str, argv: list[str], env: dict[str, str]) -> None:
        """Called in a child, before it becomes its program."""
        end_with_parent()
        super().execve(filename, argv, env)


class _Unfailing:
    """A stream of which a write that fails is lost, and no error.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str | bytes) -> int:
        """Write, or lose it. What its programs say comes as bytes."""
        with suppress(OSError):
            self._stream.write(text if isinstance(text, str) else text.decode("utf-8", "replace"))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flush, or lose it."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: list[str]) -> None:
    """Run supervisord in this process; ends with its exit code."""
    sys.stdout, sys.stderr = _Unfailing(sys.stdout), _Unfailing(sys.stderr)  # type: ignore[assignment]
    supervisord.ServerOptions = _Options
    supervisord.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
