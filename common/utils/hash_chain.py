"""Logs in which a changed or removed line is detected: each line holds the digest of the previous one.

Removing lines from the end leaves a shorter but valid chain. The log's head, its number of lines and the
digest of the last one, is therefore kept in a second file. A head noted elsewhere detects a change of both.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from fedsigma.common.utils.errors import FedSigmaError, InputError
from fedsigma.common.utils.files import write_atomic
from fedsigma.common.utils.json_lines import AppendLog, Row, parse_object, read_tail

__all__ = ["HashChainedLog", "Head", "LogTampered"]

_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")


class LogTampered(FedSigmaError, ValueError):
    """A line of a log does not follow from the previous one, or lines are missing at the end.

    Attributes:
        path: The log.
        line: Number of the first such line, from 1.
        what: What was found.
    """

    def __init__(self, path: Path, line: int, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.line, self.what = path, line, what


@dataclass(frozen=True)
class Head:
    """Length and end of a log; as text `LINES:SHA256`.

    Attributes:
        lines: Number of lines.
        digest: SHA-256 of the last line; 64 zeros for an empty log.
    """

    lines: int
    digest: str = "0" * 64

    @classmethod
    def parse(cls, text: str) -> Head:
        """Parse the text form.

        Raises:
            InputError: The text is not a head.
        """
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise InputError(f"{text.strip()[:80]!r} is no head of a log, expected LINES:SHA256")
        return cls(int(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.lines}:{self.digest}"


class HashChainedLog(AppendLog[tuple[Row, str]]):
    """A log of JSON objects; `read` and `follow` return each with the digest of its line.

    Several processes may append, one at a time.

    Args:
        path: The file; created with its folder at the first append.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.head_path = path.with_name(path.name + ".head")

    @contextmanager
    def locked(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Lock the log against other writers; the block is given the function that appends, as `append`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield partial(self._append, file)

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line and flush it to the disk.

        Raises:
            OSError: The line cannot be written.
            LogTampered: Lines were removed from the end, or the head file was changed.
        """
        with self.locked() as append:
            append(values)

    def lines(self) -> list[Row]:
        """Return all lines, without the digests that chain them; empty if there is no file.

        Raises:
            LogTampered: A line was changed or removed.
        """
        return self.check()[0]

    def check(self, noted: Head | None = None) -> tuple[list[Row], Head]:
        """Read the log and verify that no line was changed or removed; a torn last line is ignored.

        Args:
            noted: A head of this log that was noted elsewhere, at any time.

        Returns:
            The lines, and the current head.

        Raises:
            LogTampered: A line was changed or removed, or the log does not continue one of the heads.
        """
        # Read first: a line that is written meanwhile must not make the log look short.
        heads = [self._read_head(), noted]
        records = self.read()
        digests = [digest for _, digest in records]
        count = len(digests)
        for head in filter(None, heads):
            if head.lines > count:
                what = f"{head.lines - count} lines were removed from the end, after line {count}"
                raise LogTampered(self.path, count + 1, what)
            if head.lines and digests[head.lines - 1] != head.digest:
                raise LogTampered(self.path, head.lines, f"line {head.lines} is not the one that was noted")
        return [values for values, _ in records], Head(count, digests[-1]) if count else Head(0)

    def parser(self) -> Callable[[str, int], tuple[Row, str]]:
        """See `AppendLog.parser`; the parser raises LogTampered where the chain breaks."""
        previous = ""

        def parse(line: str, number: int) -> tuple[Row, str]:
            nonlocal previous
            values = parse_object(line, {"previous": str})
            if values is None or values.pop("previous") != previous:
                what = f"line {number} was changed, or a line before it was changed or removed"
                raise LogTampered(self.path, number, what)
            previous = hashlib.sha256(line.encode()).hexdigest()
            return values, previous

        return parse

    def _append(self, file: IO[bytes], values: Mapping[str, Any]) -> None:
        lines, end = read_tail(file)
        previous = hashlib.sha256(lines[-1]).hexdigest() if lines else ""
        head = self._read_head()
        if head and head.digest == previous:
            count = head.lines
        else:
            file.seek(0)
            count = file.read(end).count(b"\n")
            if head and head.lines >= count:
                # A further line would write a new head, and the removal could not be detected any more.
                what = f"its end was changed or removed: it has {count} lines, its head notes {head.lines}"
                raise LogTampered(self.path, count, what)
        line = json.dumps({**values, "previous": previous}, sort_keys=True).encode()
        file.truncate(end)
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
        # After the line: a crash in between leaves a head that is short by a line, not one that is too long.
        write_atomic(self.head_path, f"{Head(count + 1, hashlib.sha256(line).hexdigest())}\n".encode("ascii"))

    def _read_head(self) -> Head | None:
        try:
            return Head.parse(self.head_path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise LogTampered(self.path, 1, f"its head {self.head_path.name} was changed: {error}") from None
