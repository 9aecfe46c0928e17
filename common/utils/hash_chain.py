"""Logs in which a line that was changed or removed is found: each line holds the digest of the one before it.

Lines taken from the end leave a shorter chain that is whole in itself. So beside the log lies its head, the
number of its lines and the digest of the last; and who wants to trust neither file notes the head elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedsigma.common.utils.errors import FedSigmaError, InputError
from fedsigma.common.utils.files import write_atomic

__all__ = ["HashChainedLog", "Head", "LogTampered", "OpenLog"]

_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")
_BLOCK = 65536


class LogTampered(FedSigmaError, ValueError):
    """A line of a log does not follow from the one before it, or lines are missing at the end.

    Attributes:
        line: the number of the first such line, from 1.
    """

    def __init__(self, path: Path, line: int, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path, self.line, self.what = path, line, what


@dataclass(frozen=True)
class Head:
    """The length of a log in lines, and the SHA-256 of its last line (64 zeros for an empty log)."""

    lines: int
    digest: str = "0" * 64

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read what `str` writes.

        Raises:
            ValueError: it is no head.
        """
        found = _HEAD.fullmatch(text.strip())
        if found is None:
            raise InputError(f"{text.strip()[:80]!r} is no head of a log, expected LINES:SHA256")
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.lines}:{self.digest}"


class HashChainedLog:
    """A log file of JSON lines.

    Args:
        path: of the file; it and its folder are made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head_path = path.with_name(path.name + ".head")

    @contextmanager
    def opened(self) -> Iterator[OpenLog]:
        """The log, which no other process can write meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield OpenLog(self, file)

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line, and make sure that it is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        with self.opened() as log:
            log.append(values)

    def lines(self) -> list[dict[str, Any]]:
        """All lines, without the digests that chain them; none if there is no file.

        Raises:
            ChainBroken: one was changed or removed, or its end is missing.
        """
        return self.check()[0]

    def check(self, noted: Head | None = None) -> tuple[list[dict[str, Any]], Head]:
        """Read the log and find whether anything was changed or removed.

        A last line without its end was being written when the power went, and does not count.

        Args:
            noted: a head of this log that was noted elsewhere, at any time.

        Returns:
            The lines, and the head of the log as it is.

        Raises:
            ChainBroken: a line was changed or removed, or the log is no continuation of a head.
        """
        # First: a line that is written meanwhile must not make the log look short.
        kept = self._kept_head()
        content = self.path.read_bytes() if self.path.is_file() else b""
        content = content[: content.rfind(b"\n") + 1]
        found, digests = [], [""]
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                values = json.loads(line)
                if values.pop("previous") != digests[-1]:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                what = f"line {number} was changed, or a line before it was changed or removed"
                raise LogTampered(self.path, number, what) from None
            found.append(values)
            digests.append(hashlib.sha256(line).hexdigest())
        for head in filter(None, (kept, noted)):
            if head.lines > len(found):
                what = f"{head.lines - len(found)} lines were removed from the end, after line {len(found)}"
                raise LogTampered(self.path, len(found) + 1, what)
            if head.lines and digests[head.lines] != head.digest:
                raise LogTampered(self.path, head.lines, f"line {head.lines} is not the one that was noted")
        return found, Head(len(found), digests[-1]) if found else Head(0)

    def _kept_head(self) -> Head | None:
        try:
            return Head.parse(self.head_path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise LogTampered(self.path, 1, f"its head {self.head_path.name} was changed: {error}") from None


class OpenLog:
    """A log under its lock; made by `Chain.opened`."""

    def __init__(self, chain: HashChainedLog, file: IO[bytes]) -> None:
        self._chain, self._file = chain, file

    def lines(self) -> list[dict[str, Any]]:
        """As `Chain.lines`."""
        return self._chain.lines()

    def append(self, values: Mapping[str, Any]) -> None:
        """Add a line, and make sure that it is on the disk.

        Raises:
            OSError: it cannot be written.
            ChainBroken: lines were removed from the end, or the head beside the log was changed.
        """
        last, whole = self._tail()
        previous = hashlib.sha256(last).hexdigest() if last else ""
        count = self._lines_before(previous, whole)
        line = json.dumps({**values, "previous": previous}, sort_keys=True).encode()
        # What a crash left of a line goes only now, when there is one to take its place.
        self._file.truncate(whole)
        self._file.write(line + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        # After the line: a crash in between leaves a head that is short by a line, which is no sign of a cut.
        self._keep(Head(count + 1, hashlib.sha256(line).hexdigest()))

    def _lines_before(self, digest: str, whole: int) -> int:
        head = self._chain._kept_head()
        if head and head.digest == digest:
            return head.lines
        count = self._count(whole)
        if head and head.lines >= count:
            # Going on would write a new head, and nobody could tell any more.
            what = f"its end was changed or removed: it has {count} lines, and its head notes {head.lines}"
            raise LogTampered(self._chain.path, count, what)
        return count

    def _keep(self, head: Head) -> None:
        write_atomic(self._chain.head_path, f"{head}\n".encode("ascii"))

    def _tail(self) -> tuple[bytes, int]:
        """The last whole line without its end, and the length of the whole lines; reads the end alone."""
        file = self._file
        end = file.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and tail.count(b"\n") < 2:
            start = max(0, end - _BLOCK)
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
        whole = tail.rfind(b"\n") + 1
        lines = tail[:whole].splitlines()
        return (lines[-1] if lines else b""), end + whole

    def _count(self, whole: int) -> int:
        self._file.seek(0)
        return self._file.read(whole).count(b"\n")
