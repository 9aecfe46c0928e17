"""Digest of a reply as written to both audit logs, so that the logs can be cross-checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["describe", "digest"]

_SHORT = 200


def describe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a reply: short fields verbatim, long ones by size and digest, and the `digest` of all."""
    return {"fields": {name: _summarize(value) for name, value in sorted(fields.items())}, **digest(fields)}


def digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of all fields, and the SHA-256 over them with their names and lengths."""
    total, checksum = 0, hashlib.sha256()
    for name, value in sorted(fields.items()):
        raw = _raw(value)
        total += len(raw)
        # Lengths first, so that no two different replies have the same digest.
        checksum.update(f"{len(name)}:{name}{len(raw)}:".encode())
        checksum.update(raw)
    return {"bytes": total, "sha256": checksum.hexdigest()}


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=bytes.hex).encode()


def _summarize(value: Any) -> Any:
    raw = _raw(value)
    if len(raw) <= _SHORT and not isinstance(value, bytes):
        # nan is not valid JSON.
        return str(value) if isinstance(value, float) and value != value else value
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
