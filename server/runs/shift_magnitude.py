"""Where a shift is large: its mean magnitude by tower, part and layer."""

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
"""Significant digits of a value that is kept: a heat is for looking at."""


@dataclass(frozen=True, kw_only=True)
class ShiftMagnitude:
    """Mean absolute shift of one tower.

    Shapes: values (parts, layers), NaN where the study adapts nothing.
    """

    tower: str
    parts: tuple[str, ...]
    layers: tuple[int, ...]
    values: NDArray[np.float64]


def shift_magnitudes(shift: NDArray[np.float32], layout: Layout) -> tuple[ShiftMagnitude, ...]:
    """The heat of each tower that is adapted, in the layout's order. Shapes: shift (layout size,)."""
    size, towers = np.abs(shift), dict.fromkeys(entry.tower for entry in layout.entries)
    return tuple(_heat(size, tower, [e for e in layout.entries if e.tower == tower]) for tower in towers)


def _heat(size: NDArray[np.float32], tower: str, entries: Sequence[Entry]) -> ShiftMagnitude:
    parts = tuple(dict.fromkeys(entry.part for entry in entries))
    layers = tuple(sorted({entry.layer for entry in entries}))
    total, count = np.zeros((2, len(parts), len(layers)))
    for entry in entries:
        place = parts.index(entry.part), layers.index(entry.layer)
        total[place] += float(size[entry.offset : entry.offset + entry.size].sum())
        count[place] += entry.size
    values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return ShiftMagnitude(tower=tower, parts=parts, layers=layers, values=values)


def to_towers(heats: Sequence[ShiftMagnitude]) -> dict[str, Any]:
    """As JSON's own types: by tower its layers, and for each part a value a layer, None where not adapted."""
    return {
        heat.tower: {
            "layers": list(heat.layers),
            "parts": {
                part: [None if np.isnan(v) else float(f"{v:.{DIGITS}g}") for v in row]
                for part, row in zip(heat.parts, heat.values, strict=True)
            },
        }
        for heat in heats
    }
