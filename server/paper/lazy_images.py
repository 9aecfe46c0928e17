"""Test images that are decoded when they are looked at: a published set has more than memory holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import overload

from torch import Tensor

from fedsigma.common.data.loading import Example, load_examples
from fedsigma.common.data.records import Record, Source

__all__ = ["LazyExample", "LazyExamples"]

AHEAD = 64
"""How many images are decoded before they are asked for."""


@dataclass(frozen=True)
class LazyExample:
    """One image of a set that is decoded on demand; see `fedsigma.common.training.classifier.Example`."""

    examples: LazyExamples
    position: int

    @property
    def image(self) -> Tensor:
        """The picture, uint8 (3, height, width)."""
        return self.examples.decoded(self.position).image

    @property
    def label(self) -> int:
        """The class number."""
        return self.examples.labels[self.position]


class LazyExamples(Sequence[LazyExample]):
    """Labelled images in order, decoded by threads a few ahead of the one that is asked for.

    Args:
        source, records: The images.
        classes: Names of the classes; a label's index in it is the label's number.
        side: See `load_examples`. Units: pixels.
    """

    def __init__(
        self, source: Source, records: Sequence[Record], classes: Sequence[str], *, side: int
    ) -> None:
        numbers = {label: number for number, label in enumerate(classes)}
        self.labels = [numbers[str(record.label)] for record in records]
        self._source, self._records, self._classes, self._side = source, records, classes, side
        self._pool = ThreadPoolExecutor(thread_name_prefix="decode")
        self._coming: deque[tuple[int, Future[Example]]] = deque()

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> LazyExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[LazyExample]: ...
    def __getitem__(self, place: int | slice) -> LazyExample | list[LazyExample]:
        found = range(len(self))[place]
        return LazyExample(self, found) if isinstance(found, int) else [LazyExample(self, i) for i in found]

    def __iter__(self) -> Iterator[LazyExample]:
        return (LazyExample(self, position) for position in range(len(self)))

    def decoded(self, position: int) -> Example:
        """One image; those after it are begun.

        Raises:
            PictureError: It cannot be decoded.
        """
        if not self._coming or self._coming[0][0] != position:
            self._coming.clear()
            self._coming.append((position, self._begin(position)))
        last = self._coming[-1][0]
        for ahead in range(last + 1, min(position + AHEAD, len(self))):
            self._coming.append((ahead, self._begin(ahead)))
        return self._coming.popleft()[1].result()

    def _begin(self, position: int) -> Future[Example]:
        return self._pool.submit(self._load, position)

    def _load(self, position: int) -> Example:
        return load_examples(self._source, [self._records[position]], self._classes, side=self._side)[0]

    def close(self) -> None:
        """End the threads."""
        self._coming.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
