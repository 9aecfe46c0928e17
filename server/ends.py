"""The beginning and the end of a long file of lines, without what is between."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CHUNK", "first_line", "last_lines"]

CHUNK = 1 << 13


def first_line(path: Path) -> str:
    """The first whole line of a file, without its newline; empty if there is none."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return ""
    return line[:-1].decode("utf-8", "replace") if line.endswith(b"\n") else ""


def last_lines(path: Path, *, size: int = CHUNK) -> list[str]:
    """The whole lines in the last `size` bytes of a file; more bytes are read while they hold none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                start = max(0, end - size)
                file.seek(start)
                content = file.read(end - start)
                # The first piece began before `start`, and what follows the last newline is cut short.
                pieces = content.split(b"\n")[0 if start == 0 else 1 : -1]
                if pieces or start == 0:
                    return [piece.decode("utf-8", "replace") for piece in pieces]
                size *= 4
    except FileNotFoundError:
        return []
