"""Compare two model versions: studies, results, and shifts by tower and part."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.registry.manifest import ModelError
from fedsigma.common.registry.shift_file import load_shift
from fedsigma.common.registry.store import Version

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["Comparison", "ShiftRow", "compare"]


@dataclass(frozen=True)
class ShiftRow:
    """Comparison of two shifts in one group of values.

    Attributes:
        group: `all`, or tower and part, such as `image q`.
        norm: L2 norm of the first shift.
        other_norm: L2 norm of the second shift.
        cosine: Cosine similarity; 0 where one of the shifts is zero.
        distance: L2 norm of the difference.
    """

    group: str
    norm: float
    other_norm: float
    cosine: float
    distance: float


@dataclass(frozen=True)
class Comparison:
    """Differences of two versions.

    Attributes:
        study: Unified diff of the two studies; empty if they are equal.
        accuracy: Accuracy of both versions over all sites, by method.
        shifts: Comparison of the shifts for all values, and for each tower and part.
    """

    study: str
    accuracy: dict[str, tuple[float | None, float | None]]
    shifts: tuple[ShiftRow, ...]


def compare(one: Version, other: Version) -> Comparison:
    """Compare two versions.

    Raises:
        ModelError: The versions differ in backbone, layout or basis, so their shifts cannot be compared.
    """
    from fedsigma.common.sigma import Fingerprint, Layout

    first, second = load_shift(one.path), load_shift(other.path)
    problem = Fingerprint.from_json(first.fingerprint_json).describe_mismatch(
        Fingerprint.from_json(second.fingerprint_json)
    )
    if problem or first.layout_json != second.layout_json:
        raise ModelError(
            f"{one.manifest.reference} and {other.manifest.reference} cannot be compared:"
            f" {problem or 'their layouts differ'}"
        )
    layout = Layout.from_json(first.layout_json)
    shifts = (saved.shift.numpy().astype(np.float64) for saved in (first, second))
    names = one.manifest.reference, other.manifest.reference
    lines = difflib.unified_diff(
        first.study_yaml.splitlines(), second.study_yaml.splitlines(), *names, lineterm=""
    )
    results = one.manifest.results, other.manifest.results
    methods = dict.fromkeys([*results[0], *results[1]])
    return Comparison(
        study="\n".join(lines),
        accuracy={
            method: (results[0].get(method, {}).get("accuracy"), results[1].get(method, {}).get("accuracy"))
            for method in methods
        },
        shifts=tuple(_rows(layout, *shifts)),
    )


def _rows(layout: Layout, one: NDArray[np.float64], other: NDArray[np.float64]) -> Iterator[ShiftRow]:
    masks = {"all": np.ones(layout.size, bool)}
    for entry in layout.entries:
        name = f"{entry.tower} {entry.part}"
        mask = masks.setdefault(name, np.zeros(layout.size, bool))
        mask[entry.offset : entry.offset + entry.size] = True
    for name, mask in masks.items():
        a, b = one[mask], other[mask]
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        product = norms[0] * norms[1]
        cosine = float(a @ b) / product if product else 0.0
        yield ShiftRow(name, *norms, cosine, float(np.linalg.norm(a - b)))
