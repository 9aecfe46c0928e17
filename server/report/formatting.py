"""How numbers, methods and rounds are put into words, the same in the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "METHODS",
    "format_bytes",
    "format_decimal",
    "format_duration",
    "format_percent",
    "format_points",
    "format_timestamp",
    "round_list",
    "shorten",
]

METHODS = {
    "zero_shot": "Zero-shot",
    "local_only": "Local only",
    "shared_only": "Shared part only",
    "federated": "Federated",
    "pooled": "Pooled",
}
"""The methods of summary.json in the order of reading, with the names shown to people."""

NOTHING = "–"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def format_percent(value: Any) -> str:
    """0.4567 as 45.7%."""
    return f"{100 * value:.1f}%" if _known(value) else NOTHING


def format_decimal(value: Any) -> str:
    """0.45678 as 0.457."""
    return f"{value:.3f}" if _known(value) else NOTHING


def format_points(value: Any) -> str:
    """A difference of shares in percentage points, with its sign: 0.123 as +12.3."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}") if _known(value) else NOTHING


def format_bytes(count: Any) -> str:
    """Bytes in decimal units: 61700 as 61.7 kB."""
    if not _known(count):
        return NOTHING
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def format_duration(seconds: Any) -> str:
    """201.7 as 3 min 22 s."""
    if not _known(seconds):
        return NOTHING
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def format_timestamp(seconds: Any) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    if not _known(seconds):
        return NOTHING
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def round_list(rounds: Iterable[int]) -> str:
    """3, 4, 5, 8 as `3–5, 8`."""
    pieces: list[list[int]] = []
    for number in sorted(set(rounds)):
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ", ".join(_span(piece) for piece in pieces)


def _span(piece: Sequence[int]) -> str:
    if len(piece) == 1:
        return str(piece[0])
    return f"{piece[0]}–{piece[-1]}" if len(piece) > 2 else f"{piece[0]}, {piece[1]}"


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis if it is longer than this."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
