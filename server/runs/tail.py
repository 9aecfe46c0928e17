"""Reading a run folder while it grows: only what is new is parsed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsigma.server.runs.append_log import as_object, csv_cells
from fedsigma.server.runs.run_dir import Row, RunDir, latest_rows, parse_row

__all__ = ["RunTailer"]


@dataclass
class _Followed:
    """How far one growing file was read. identity: a file that was replaced is another."""

    identity: tuple[int, int] = (0, 0)
    offset: int = 0
    lines: int = 0
    header: list[str] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)
    latest: list[Any] | None = None


class RunTailer(RunDir):
    """A run folder that is read again and again: what was parsed once is kept, for as long as this lives.

    Reads as `RunDir` does, to the same result; safe for several threads. Not for writing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reading = threading.Lock()
        self._files: dict[str, _Followed] = {}

    @property
    def state(self) -> tuple[int, ...]:
        """Changes when any file of the run did."""
        found: list[int] = []
        for name in (
            "events.jsonl",
            "rounds.csv",
            "shift_magnitude.jsonl",
            "summary.json",
            "sigma.safetensors",
        ):
            try:
                known = (self.path / name).stat()
            except FileNotFoundError:
                continue
            found += [known.st_size, known.st_mtime_ns]
        return tuple(found)

    def events(self) -> list[Row]:
        """As `RunFolder.events`, without a last line that is still being written."""
        with self._reading:
            return list(self._follow("events.jsonl", _event).found)

    def rounds(self) -> list[Row]:
        """As `RunFolder.rounds`; the rows are shared by all who ask, so they are not to be changed."""
        with self._reading:
            found = self._follow("rounds.csv", _row)
            if found.latest is None:
                found.latest = latest_rows(found.found)
            return list(found.latest)

    def shift_magnitudes(self) -> list[Row]:
        """As `RunDir.shift_magnitudes`."""
        with self._reading:
            found = self._follow("shift_magnitude.jsonl", _heat).found
        latest = {line["round"]: line for line in found}
        return [latest[number] for number in sorted(latest)]

    def _follow(self, name: str, parse: Callable[[_Followed, str], Any]) -> _Followed:
        known = self._files.setdefault(name, _Followed())
        try:
            file = (self.path / name).open("rb")
        except FileNotFoundError:
            self._files[name] = _Followed()
            return self._files[name]
        with file:
            about = os.fstat(file.fileno())
            identity = about.st_dev, about.st_ino
            if identity != known.identity or about.st_size < known.offset:
                known = self._files[name] = _Followed(identity=identity)
            file.seek(known.offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        known.offset += len(whole)
        if whole:
            known.latest = None
        for line in whole.decode("utf-8", "replace").split("\n")[:-1]:
            known.lines += 1
            one = parse(known, line.removesuffix("\r"))
            if one is not None:
                known.found.append(one)
        return known


def _event(known: _Followed, line: str) -> Row | None:
    found = as_object(line, kind=str)
    if found is None and line.strip():
        return {"time": None, "kind": "unreadable_line", "line": known.lines}
    return found


def _heat(known: _Followed, line: str) -> Row | None:
    return as_object(line, round=int, towers=dict)


def _row(known: _Followed, line: str) -> Row | None:
    if not line.strip():
        return None
    cells = csv_cells(line)
    if not known.header:
        known.header = cells
        return None
    return parse_row(known.header, cells)
