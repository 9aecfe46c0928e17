"""The layout: which matrices are adapted, and where the values of each are in the flat sigma shift."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from fedsigma.common.utils.errors import FedSigmaError


class LayoutError(FedSigmaError, ValueError):
    """A layout or shift is invalid, or does not fit the model."""


@dataclass(frozen=True)
class Entry:
    """One adapted matrix.

    Attributes:
        weight: name of the model's parameter that holds the matrix.
        part: `q`, `k`, `v`, `o` or `mlp`.
        tower: `image` or `text`.
        layer: number of the layer within its tower, from 0.
        offset: position of the matrix's first value in the flat shift.
        size: number of its values: min(rows, columns) of the matrix.
        rows: first row and last row + 1 of the matrix in the parameter.
    """

    weight: str
    part: str
    tower: str
    layer: int
    offset: int
    size: int
    rows: tuple[int, int]

    @property
    def key(self) -> str:
        """A name that is unique in the layout."""
        return f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True)
class Layout:
    """The ordered entries that map a flat shift to the adapted matrices.

    Attributes:
        entries: one for each adapted matrix, in the order of their offsets.

    Raises:
        LayoutError: entries overlap or leave a gap, or there are none.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise LayoutError("the selection adapts no weight: choose more layers or parts")
        offset = 0
        for entry in self.entries:
            if entry.offset != offset or entry.size < 1:
                raise LayoutError(f"entry {entry.key} starts at {entry.offset}, expected {offset}")
            offset += entry.size

    @property
    def size(self) -> int:
        """Number of values of the flat shift."""
        last = self.entries[-1]
        return last.offset + last.size

    @cached_property
    def entry_sizes(self) -> tuple[int, ...]:
        """Number of values of each entry, in order."""
        return tuple(entry.size for entry in self.entries)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layout, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The layout as canonical JSON."""
        return json.dumps([asdict(e) for e in self.entries], separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Parse the output of `to_json`.

        Raises:
            LayoutError: the text is not a layout.
        """
        try:
            rows = json.loads(text)
            entries = tuple(Entry(**{**row, "rows": (row["rows"][0], row["rows"][1])}) for row in rows)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise LayoutError(
                f"not a layout ({error}): expected the JSON that Layout.to_json writes"
            ) from None
        return cls(entries)
