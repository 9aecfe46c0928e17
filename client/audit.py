"""The site's record of every answer it gave: one JSON line for each, written before the answer leaves.

The log belongs to the site and never leaves it. It is chained (`fedsigma.common.chain`), so that a line that
was changed or removed later is found.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.chain import Chain

__all__ = ["AuditLog", "describe"]


class AuditLog:
    """Appends to one site's log."""

    def __init__(self, path: Path) -> None:
        self._log = Chain(path)

    def record(self, asked: Mapping[str, Any], left: Mapping[str, Any]) -> None:
        """Write down what was asked and what is about to leave, and make sure that it is on the disk.

        Args:
            asked: what the server wanted: kind of message, study, round.
            left: the fields of the reply as they lie on the wire, or `{"error": type name}`.

        Raises:
            OSError, ChainBroken: the line cannot be written, or an earlier one was removed; the reply must
                then not be sent.
        """
        self._log.append({"time": round(time.time(), 3), "asked": dict(asked), "left": describe(left)})


def describe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the fields of a reply are: short values as they are, long ones by size and digest."""
    said = {name: _say(value) for name, value in sorted(fields.items())}
    total = sum(len(_raw(value)) for value in fields.values())
    whole = hashlib.sha256()
    for name, value in sorted(fields.items()):
        # Lengths first, so that no two different replies have the same digest.
        whole.update(f"{len(name)}:{name}{len(_raw(value))}:".encode() + _raw(value))
    return {"fields": said, "bytes": total, "sha256": whole.hexdigest()}


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _say(value: Any) -> Any:
    raw = _raw(value)
    if len(raw) <= 200 and not isinstance(value, bytes):
        # nan is no JSON; the log shows what the wire carried all the same.
        return str(value) if isinstance(value, float) and value != value else value
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
