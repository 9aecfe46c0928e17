"""Files that grow by complete lines and survive a process that is killed at any moment.

A line is written by one write, so a killed process leaves either the line or its beginning. Readers ignore a
torn last line, and the next writer removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

__all__ = [
    "CHUNK",
    "AppendLog",
    "JsonLines",
    "Row",
    "first_line",
    "last_lines",
    "parse_object",
    "read_tail",
    "to_json",
]

CHUNK = 1 << 13
"""How many bytes of the end of a file are read at first."""

Row = dict[str, Any]
T = TypeVar("T")


class AppendLog(Generic[T]):
    """A file of lines, each of which is one record.

    One process may append. `read` reads the whole file; `follow` parses only what is new since the last call.
    Neither changes the file.

    Attributes:
        path: The file; it is created by the first append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._repaired = False
        self._restart((0, 0))

    def parser(self) -> Callable[[str, int], T | None]:
        """Return a function from a line and its number, from 1, to its record; None if it holds none.

        It is called with the lines of one file in order.
        """
        raise NotImplementedError

    def is_complete(self, line: str) -> bool:
        """Return whether a last line without a newline is nevertheless complete."""
        return False

    def append_line(self, line: str) -> None:
        """Append one line, after the file's torn last line was repaired."""
        self.repair()
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode("utf-8", "replace") + b"\n")

    def repair(self) -> None:
        """At the first call, complete a last line that lacks only its newline, and remove a torn one."""
        if self._repaired:
            return
        self._repaired = True
        if not self.path.is_file():
            return
        with self.path.open("r+b") as file:
            _, end = read_tail(file)
            file.seek(end)
            torn = file.read()
            if torn and self.is_complete(torn.decode("utf-8", "replace")):
                file.write(b"\n")
            elif torn:
                file.truncate(end)

    def read(self) -> list[T]:
        """Return all records in their order."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        *lines, tail = content.decode("utf-8", "replace").split("\n")
        if tail and self.is_complete(tail):
            lines.append(tail)
        parse = self.parser()
        records = (parse(line, number) for number, line in enumerate(lines, start=1))
        return [record for record in records if record is not None]

    def follow(self) -> list[T]:
        """Return all records of lines that end in a newline; only the new lines are parsed.

        A file that was replaced or became shorter is read from its start. The list is the log's own, so
        callers must not change it.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._restart((0, 0))
            return self._records
        with file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            if identity != self._identity or status.st_size < self._offset:
                self._restart(identity)
            file.seek(self._offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._offset += len(content)
        for line in content.decode("utf-8", "replace").split("\n")[:-1]:
            self._number += 1
            record = self._parse(line, self._number)
            if record is not None:
                self._records.append(record)
        return self._records

    def _restart(self, identity: tuple[int, int]) -> None:
        self._identity, self._offset, self._number = identity, 0, 0
        self._records: list[T] = []
        self._parse = self.parser()


class JsonLines(AppendLog[Row]):
    """A file with one JSON object a line.

    Args:
        path: The file.
        fields: Fields that each object has, with their types.
        report_damage: Whether a damaged line is read as an event of kind `unreadable_line`; else it is
            left out.
    """

    def __init__(self, path: Path, *, fields: Mapping[str, type], report_damage: bool = False) -> None:
        self._fields = fields
        self._report_damage = report_damage
        super().__init__(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite are written as null.

        Raises:
            TypeError: A value cannot be written as JSON.
        """
        self.append_line(to_json(record))

    def parser(self) -> Callable[[str, int], Row | None]:
        """See `AppendLog.parser`."""
        return self._parse_line

    def _parse_line(self, line: str, number: int) -> Row | None:
        record = parse_object(line, self._fields)
        if record is None and self._report_damage and line.strip():
            return {"time": None, "kind": "unreadable_line", "line": number}
        return record

    def is_complete(self, line: str) -> bool:
        """See `AppendLog.is_complete`."""
        return parse_object(line, self._fields) is not None


def parse_object(line: str, fields: Mapping[str, type]) -> Row | None:
    """Parse a line as a JSON object that has all these fields, each of its type; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return record if all(type(record.get(name)) is kind for name, kind in fields.items()) else None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON; arrays and scalars of numpy and torch become numbers, and NaN becomes null.

    Raises:
        TypeError: A value cannot be written as JSON.
    """
    return json.dumps(_plain(value), ensure_ascii=indent is None, allow_nan=False, indent=indent)


def first_line(path: Path) -> str:
    """Return the first complete line of a file, without its newline; empty if there is none."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return ""
    return line[:-1].decode("utf-8", "replace") if line.endswith(b"\n") else ""


def last_lines(path: Path, *, size: int = CHUNK) -> list[str]:
    """Return the complete lines in the last `size` bytes of a file; if there are none, read more bytes."""
    try:
        with path.open("rb") as file:
            return [line.decode("utf-8", "replace") for line in read_tail(file, size)[0]]
    except FileNotFoundError:
        return []


def read_tail(file: IO[bytes], size: int = CHUNK) -> tuple[list[bytes], int]:
    """Read the complete lines at the end of a file, and the offset at which the last of them ends."""
    end = file.seek(0, os.SEEK_END)
    while True:
        start = max(0, end - size)
        file.seek(start)
        content = file.read(end - start)
        # The first piece began before `start`, and what follows the last newline is torn.
        lines = content.split(b"\n")[0 if start == 0 else 1 : -1]
        if lines or start == 0:
            return lines, start + content.rfind(b"\n") + 1
        size *= 4


def _plain(value: Any) -> Any:
    """A copy of the value in JSON's own types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars alike
        return _plain(value.tolist())
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON: use numbers or text")
