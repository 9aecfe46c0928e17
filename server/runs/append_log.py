"""Files that grow by whole lines, of JSON objects or as a table, and survive a process killed at any moment.

A line is written by one write, so a killed process leaves either the line or a beginning of it. Readers
ignore a last line that was cut short, and the next writer removes it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "CHUNK",
    "append_line",
    "as_object",
    "cell",
    "csv_cells",
    "csv_line",
    "first_line",
    "last_lines",
    "read_lines",
    "read_table",
    "repair",
]

CHUNK = 1 << 13
"""How many bytes of the end of a file are read at first."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file whose last line is whole."""
    with path.open("ab", buffering=0) as file:
        file.write(text.encode("utf-8", "replace") + b"\n")


def repair(path: Path, keep_tail: Callable[[str], bool] | None) -> None:
    """Before the first append: end the last line if it is whole but for its newline, else remove it.

    Args:
        path: of the file, if there is one.
        keep_tail: whether a last line without a newline is whole; None where that cannot be told.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    tail = content[start:].decode("utf-8", "replace")
    with path.open("r+b") as file:
        if keep_tail is not None and keep_tail(tail):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)


def read_lines(path: Path) -> list[tuple[str, bool]]:
    """Each line with whether its newline was written."""
    if not path.is_file():
        return []
    *whole, tail = path.read_bytes().decode("utf-8", "replace").split("\n")
    lines = [(line.removesuffix("\r"), True) for line in whole]
    return [*lines, (tail, False)] if tail else lines


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


def as_object(text: str, **fields: type) -> dict[str, Any] | None:
    """A line as a JSON object that has these fields, each of its type; None if it is no whole one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(found, dict) and all(type(found.get(name)) is kind for name, kind in fields.items())
    return found if good else None


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, without a last line that a crash cut short.

    Unlike an object, a cut row cannot be told from a whole one (12 may have been 128), so it never counts.
    """
    lines = [text for text, whole in read_lines(path) if whole and text.strip()]
    cells = [csv_cells(text) for text in lines]
    return (cells[0], cells[1:]) if cells else ([], [])


def cell(value: Any) -> str:
    """A value as it stands in a table; empty for None and for a number that is not finite."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _CONTROL.sub(" ", value)  # one row stays one line
    number = float(value)
    if not math.isfinite(number):
        return ""
    return str(int(number)) if number.is_integer() else repr(number)


def csv_line(cells: list[str]) -> str:
    """A row of a table, without its newline."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()


def csv_cells(line: str) -> list[str]:
    """The cells of one line; none if it is damaged."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a field longer than any that is written here: a damaged line
        return []
