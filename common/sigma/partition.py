"""The division of a shift into values that are shared and values that stay at the site."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.sigma.layout import Layout, LayoutError

Vector = NDArray[np.float32]


class ParameterPartition:
    """A layout with shared and personal entries. Personal values are never sent.

    Args:
        full: the layout of all trained values.
        personal: keys of the personal entries; keys that are not in the layout are ignored. None: all entries
            are shared.

    Attributes:
        full: the layout of all trained values.
        shared: the layout of the shared values, in the same order.

    Raises:
        LayoutError: all entries are personal, or `personal` is given and matches no entry.
    """

    def __init__(self, full: Layout, personal: frozenset[str] | None = None) -> None:
        self.full = full
        keys = frozenset() if personal is None else personal & {entry.key for entry in full.entries}
        if personal is not None and not keys:
            raise LayoutError(
                "no adapted weight is personal: select some of the weights in sigma, or remove personal"
            )
        if len(keys) == len(full.entries):
            raise LayoutError("all adapted weights are personal, so none are shared: select fewer")
        self._personal = np.zeros(full.size, dtype=bool)
        entries, offset = [], 0
        for entry in full.entries:
            if entry.key in keys:
                self._personal[entry.offset : entry.offset + entry.size] = True
            else:
                entries.append(replace(entry, offset=offset))
                offset += entry.size
        self.shared = full if not keys else Layout(tuple(entries))

    @cached_property
    def personal_size(self) -> int:
        """Number of personal values."""
        return int(self._personal.sum())

    def shared_values(self, shift: Vector) -> Vector:
        """The shared values, shape (shared.size,), of a full shift, shape (full.size,)."""
        return shift[~self._personal]

    def personal_values(self, shift: Vector) -> Vector:
        """The personal values, shape (personal_size,), of a full shift, shape (full.size,)."""
        return shift[self._personal]

    def combine(self, shared: Vector, personal: Vector | None = None) -> Vector:
        """Combine shared values and personal ones (zeros by default) into a full shift (full.size,)."""
        shift = np.zeros(self.full.size, np.float32)
        shift[~self._personal] = shared
        if personal is not None:
            shift[self._personal] = personal
        return shift
