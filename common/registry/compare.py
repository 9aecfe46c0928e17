"""How two versions differ: their studies, their results, and their shifts by tower and part."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.registry.manifest import ModelError
from fedsigma.common.registry.publish import load
from fedsigma.common.registry.store import Version

__all__ = ["Difference", "ShiftRow", "compare"]


@dataclass(frozen=True)
class ShiftRow:
    """One part of two shifts: their L2 norms, the cosine between them (0 where one is zero), and the norm of
    their difference."""

    where: str
    one: float
    other: float
    cosine: float
    apart: float


@dataclass(frozen=True)
class Difference:
    """What differs. study: a unified diff, empty if the same; accuracy: by method, of both."""

    study: str
    accuracy: dict[str, tuple[float | None, float | None]]
    shifts: tuple[ShiftRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON's own types."""
        return asdict(self)


def compare(one: Version, other: Version) -> Difference:
    """Compare two versions.

    Raises:
        ModelError: they are not of one backbone, layout and basis, so that their shifts cannot be compared.
    """
    from fedsigma.common.sigma import Fingerprint, Layout

    first, second = load(one), load(other)
    problem = Fingerprint.from_json(first.fingerprint_json).describe_mismatch(
        Fingerprint.from_json(second.fingerprint_json)
    )
    if problem or first.layout_json != second.layout_json:
        raise ModelError(
            f"{one.manifest.reference} and {other.manifest.reference} cannot be compared:"
            f" {problem or 'their layouts differ'}"
        )
    layout = Layout.from_json(first.layout_json)
    pair = first.shift.numpy().astype(np.float64), second.shift.numpy().astype(np.float64)
    names = one.manifest.reference, other.manifest.reference
    lines = difflib.unified_diff(
        first.study_yaml.splitlines(), second.study_yaml.splitlines(), *names, lineterm=""
    )
    results = one.manifest.results, other.manifest.results
    return Difference(
        study="\n".join(lines),
        accuracy={
            method: (results[0].get(method, {}).get("accuracy"), results[1].get(method, {}).get("accuracy"))
            for method in dict.fromkeys([*results[0], *results[1]])
        },
        shifts=tuple(_rows(layout, *pair)),
    )


def _rows(layout: Any, one: NDArray[np.float64], other: NDArray[np.float64]) -> Iterator[ShiftRow]:
    whole = np.ones(layout.size, bool)
    masks = {"all": whole}
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
