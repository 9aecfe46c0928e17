"""What an answer is, in a line of a log: both sides write the same digest, so their logs can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["describe", "digest"]

_SHORT = 200


def describe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the fields of an answer are: short values as they are, long ones by size and digest.

    Returns:
        fields; bytes, the sum of their sizes; sha256, of all fields with their names and lengths.
    """
    return {"fields": {name: _say(value) for name, value in sorted(fields.items())}, **digest(fields)}


def digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The bytes and sha256 of `describe` alone."""
    total, whole = 0, hashlib.sha256()
    for name, value in sorted(fields.items()):
        raw = _raw(value)
        total += len(raw)
        # Lengths first, so that no two different replies have the same digest.
        whole.update(f"{len(name)}:{name}{len(raw)}:".encode())
        whole.update(raw)
    return {"bytes": total, "sha256": whole.hexdigest()}


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=bytes.hex).encode()


def _say(value: Any) -> Any:
    raw = _raw(value)
    if len(raw) <= _SHORT and not isinstance(value, bytes):
        # nan is no JSON; the log shows what the wire carried all the same.
        return str(value) if isinstance(value, float) and value != value else value
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
