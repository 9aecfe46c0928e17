"""Formatting of numbers, methods and rounds, shared by the report, the dashboard and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

__all__ = [
    "METHODS",
    "MISSING",
    "format_bytes",
    "format_decimal",
    "format_duration",
    "format_percent",
    "format_points",
    "format_ranges",
    "format_timestamp",
    "truncate",
]

METHODS = {
    "zero_shot": "Zero-shot",
    "local_only": "Local only",
    "shared_only": "Shared part only",
    "federated": "Federated",
    "pooled": "Pooled",
}
"""The methods of summary.json in display order, with their display names."""

MISSING = "–"
"""Shown in place of a value that is not known."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def format_percent(value: Any) -> str:
    """Format a fraction as a percentage: 0.4567 as `45.7%`."""
    return f"{100 * value:.1f}%" if _is_number(value) else MISSING


def format_decimal(value: Any) -> str:
    """Format a number with three decimals: 0.45678 as `0.457`."""
    return f"{value:.3f}" if _is_number(value) else MISSING


def format_points(value: Any) -> str:
    """Format a difference of fractions in percentage points, with its sign: 0.123 as `+12.3`."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}") if _is_number(value) else MISSING


def format_bytes(count: Any) -> str:
    """Format bytes in decimal units: 61700 as `61.7 kB`."""
    if not _is_number(count):
        return MISSING
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def format_duration(seconds: Any) -> str:
    """Format seconds: 201.7 as `3 min 22 s`."""
    if not _is_number(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_timestamp(seconds: Any) -> str:
    """Format seconds since 1970 as a date and time in UTC."""
    if not _is_number(seconds):
        return MISSING
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_ranges(numbers: Iterable[int]) -> str:
    """Format numbers as ranges: 3, 4, 5, 8 as `3–5, 8`."""
    texts: list[str] = []
    # Consecutive numbers have the same distance to their index.
    for _, group in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        values = [number for _, number in group]
        texts += [f"{values[0]}–{values[-1]}"] if len(values) > 2 else map(str, values)
    return ", ".join(texts)


def truncate(text: str, length: int) -> str:
    """Return the text, cut to `length` characters with an ellipsis if it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
