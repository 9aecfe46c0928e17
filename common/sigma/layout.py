"""Which weights a study adapts, and where each one's values lie in the flat vector."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from fedsigma.common.config.constants import PARTS, THIRDS, TOWERS
from fedsigma.common.utils.errors import FedSigmaError


class LayoutError(FedSigmaError, ValueError):
    """A selection or a layout that cannot be used; the message says why and what to do."""


def _known(kind: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not values:
        raise LayoutError(f"no {kind} selected: choose at least one of {', '.join(known)}")
    for value in values:
        if value not in known:
            raise LayoutError(f"unknown {kind} {value!r}: choose from {', '.join(known)}")
    if len(set(values)) != len(values):
        raise LayoutError(f"{kind} listed twice in {list(values)}: name each once")


@dataclass(frozen=True)
class Selection:
    """What to adapt: towers, layers and parts of each layer.

    `layers` is "all", a third of each tower ("bottom" is nearest the input), or layer numbers from 0.

    Raises:
        LayoutError: an unknown or repeated word, or an empty list.
    """

    towers: tuple[str, ...] = TOWERS
    layers: str | tuple[int, ...] = "all"
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        _known("tower", self.towers, TOWERS)
        _known("part", self.parts, PARTS)
        if isinstance(self.layers, str):
            if self.layers not in THIRDS:
                raise LayoutError(
                    f"unknown layers {self.layers!r}: use one of {', '.join(THIRDS)}, or a list of numbers"
                )
        elif not self.layers or min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise LayoutError(
                f"layers {list(self.layers)}: use different numbers from 0 on, at least one of them"
            )

    def picks(self, layer: int, depth: int) -> bool:
        """Whether layer number `layer` of a tower of `depth` layers is adapted."""
        if self.layers == "all":
            return True
        if isinstance(self.layers, str):
            third = THIRDS.index(self.layers) - 1
            return third * depth <= 3 * layer < (third + 1) * depth
        return layer in self.layers


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
    def blocks(self) -> tuple[int, ...]:
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
