"""Mean magnitude of a shift by tower, part and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch is slow to import, and a report of a run without a shift needs none
    from fedsigma.common.sigma.layout import Entry, Layout

__all__ = ["ShiftMagnitude", "shift_magnitudes", "to_towers"]

DIGITS = 4
"""Significant digits of a value in the file: the magnitudes are for display."""


@dataclass(frozen=True, kw_only=True)
class ShiftMagnitude:
    """Mean absolute shift of one tower.

    Attributes:
        tower: `image` or `text`.
        parts: Adapted parts, the rows of `values`.
        layers: Numbers of the adapted layers, the columns of `values`.
        values: Shape (parts, layers); NaN where the study adapts nothing.
    """

    tower: str
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    values: NDArray[np.float64]


def shift_magnitudes(shift: NDArray[np.float32], layout: Layout) -> tuple[ShiftMagnitude, ...]:
    """Return the mean magnitudes of each adapted tower, in the layout's order.

    Args:
        shift: Shape (layout size,).
        layout: The layout of the shift.
    """
    size, towers = np.abs(shift), dict.fromkeys(entry.tower for entry in layout.entries)
    return tuple(
        _tower_magnitude(size, tower, [e for e in layout.entries if e.tower == tower]) for tower in towers
    )


def _tower_magnitude(size: NDArray[np.float32], tower: str, entries: Sequence[Entry]) -> ShiftMagnitude:
    parts = tuple(dict.fromkeys(entry.part for entry in entries))
    layers = tuple(sorted({entry.layer for entry in entries}))
    total, count = np.zeros((2, len(parts), len(layers)))
    for entry in entries:
        cell = parts.index(entry.part), layers.index(entry.layer)
        total[cell] += float(size[entry.offset : entry.offset + entry.size].sum())
        count[cell] += entry.size
    values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return ShiftMagnitude(tower=tower, parts=parts, layers=layers, values=values)


def to_towers(magnitudes: Sequence[ShiftMagnitude]) -> dict[str, Any]:
    """Convert to JSON types: layers and values by part for each tower; None where nothing is adapted."""
    return {
        magnitude.tower: {
            "layers": list(magnitude.layers),
            "parts": {
                part: [None if np.isnan(v) else float(f"{v:.{DIGITS}g}") for v in row]
                for part, row in zip(magnitude.parts, magnitude.values, strict=True)
            },
        }
        for magnitude in magnitudes
    }
