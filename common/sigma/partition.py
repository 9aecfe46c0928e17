"""Which values of the shift are shared, and which stay at the site that trained them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.sigma.layout import Layout, LayoutError

Vector = NDArray[np.float32]


class ParameterPartition:
    """A layout, of which some entries are personal: never sent, a site's own.

    Args:
        full: the layout of all that is trained.
        personal: keys of the personal entries; others than the layout's are left out.

    Attributes:
        full: as given.
        shared: the layout of what is sent, its values in their order.

    Raises:
        LayoutError: everything is personal, or nothing of what is trained although something should be.
    """

    def __init__(self, full: Layout, personal: frozenset[str] | None = None) -> None:
        self.full = full
        own = frozenset() if personal is None else personal & {entry.key for entry in full.entries}
        if personal is not None and not own:
            raise LayoutError("this is nothing that sigma adapts: choose some of that, or leave personal out")
        if len(own) == len(full.entries):
            raise LayoutError("this is all that sigma adapts, so nothing is shared: choose less of it")
        self._own = np.zeros(full.size, dtype=bool)
        entries, offset = [], 0
        for entry in full.entries:
            if entry.key in own:
                self._own[entry.offset : entry.offset + entry.size] = True
            else:
                entries.append(replace(entry, offset=offset))
                offset += entry.size
        self.shared = full if not own else Layout(tuple(entries))

    @cached_property
    def personal_size(self) -> int:
        """How many values are personal."""
        return int(self._own.sum())

    def shared_values(self, shift: Vector) -> Vector:
        """The shared values (shared size,) of a whole shift (full size,)."""
        return shift[~self._own]

    def personal_values(self, shift: Vector) -> Vector:
        """The personal values (personal_size,) of a whole shift (full size,)."""
        return shift[self._own]

    def combine(self, shared: Vector, personal: Vector | None = None) -> Vector:
        """The whole shift (full size,) of shared values and personal ones, which are zeros by default."""
        whole = np.zeros(self.full.size, np.float32)
        whole[~self._own] = shared
        if personal is not None:
            whole[self._own] = personal
        return whole
