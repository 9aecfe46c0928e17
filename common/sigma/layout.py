"""Which weights a study adapts, and where each one's values lie in the flat vector."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from fedsigma.common.utils.errors import FedSigmaError


class LayoutError(FedSigmaError, ValueError):
    """A selection or a layout that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """One adapted matrix: rows `rows[0]:rows[1]` of the parameter `weight`.

    Its `size` = min(rows, columns) values lie at `offset` in the flat vector.
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
        """A name that no other entry of the layout has."""
        return f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"


@dataclass(frozen=True)
class Layout:
    """The ordered entries that map a flat vector to the adapted matrices.

    Raises:
        LayoutError: entries that overlap, leave a gap, or none at all.
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
        """Length of the flat vector."""
        last = self.entries[-1]
        return last.offset + last.size

    @cached_property
    def entry_sizes(self) -> tuple[int, ...]:
        """The number of values of each entry, in order."""
        return tuple(entry.size for entry in self.entries)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the layout, as 64 hexadecimal characters; equal layouts have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The layout as canonical JSON."""
        return json.dumps([asdict(e) for e in self.entries], separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Read what `to_json` wrote.

        Raises:
            LayoutError: not a layout.
        """
        try:
            rows = json.loads(text)
            entries = tuple(Entry(**{**row, "rows": (row["rows"][0], row["rows"][1])}) for row in rows)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise LayoutError(
                f"not a layout ({error}): expected the JSON that Layout.to_json writes"
            ) from None
        return cls(entries)
