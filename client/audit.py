"""The site's record of every answer it gave: one JSON line for each, written before the answer leaves.

The log belongs to the site and never leaves it. Each line holds the digest of the line before it, so that a
line changed or removed later can be noticed by `verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["AuditLog", "verify"]


class AuditLog:
    """Appends to one site's log. One process at a time may write a site's log."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, asked: Mapping[str, Any], left: Mapping[str, Any]) -> None:
        """Write down what was asked and what is about to leave, and make sure that it is on the disk.

        Args:
            asked: what the server wanted: kind of message, study, round.
            left: the fields of the reply as they lie on the wire, or `{"error": type name}`.

        Raises:
            OSError: the line cannot be written; the reply must then not be sent.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "time": round(time.time(), 3),
            "asked": dict(asked),
            "left": describe(left),
            "previous": _last_digest(self.path),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def describe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the fields of a reply are: short values as they are, long ones by size and digest."""
    said = {name: _say(value) for name, value in sorted(fields.items())}
    total = sum(len(_raw(value)) for value in fields.values())
    whole = hashlib.sha256()
    for name, value in sorted(fields.items()):
        # Lengths first, so that no two different replies have the same digest.
        whole.update(f"{len(name)}:{name}{len(_raw(value))}:".encode() + _raw(value))
    return {"fields": said, "bytes": total, "sha256": whole.hexdigest()}


def verify(path: Path) -> int | None:
    """Return the number of the first line that does not follow from the one before it; None if all do."""
    previous = ""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if json.loads(line)["previous"] != previous:
                return number
        except (ValueError, KeyError, TypeError):
            return number
        previous = hashlib.sha256(line).hexdigest()
    return None


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _say(value: Any) -> Any:
    raw = _raw(value)
    if len(raw) <= 200 and not isinstance(value, bytes):
        # nan is no JSON; the log shows what the wire carried all the same.
        return str(value) if isinstance(value, float) and value != value else value
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _last_digest(path: Path) -> str:
    if not path.is_file():
        return ""
    lines = path.read_bytes().splitlines()
    return hashlib.sha256(lines[-1]).hexdigest() if lines else ""
