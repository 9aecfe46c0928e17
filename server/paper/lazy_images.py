"""Test images that are decoded on demand, since a published set can be larger than memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedsigma.common.data.loading import Example, load_examples
from fedsigma.common.data.records import Record, Source

__all__ = ["LazyExample", "lazy_examples"]

AHEAD = 64
"""Number of images that are decoded in advance."""


@dataclass(frozen=True)
class LazyExample:
    """An example whose image is decoded at each access; see `fedsigma.common.data.loading.Example`.

    Attributes:
        label: Index of the class.
        decode: Returns the image.
    """

    label: int
    decode: Callable[[], Tensor]

    @property
    def image(self) -> Tensor:
        """Image, uint8 (3, height, width)."""
        return self.decode()


@contextmanager
def lazy_examples(
    source: Source, records: Sequence[Record], classes: Sequence[str], *, side: int
) -> Iterator[list[LazyExample]]:
    """Open labelled images, which threads decode in order a few ahead of the last access.

    Args:
        source: Source of the records.
        records: Images to open.
        classes: Names of the classes.
        side: Greatest length of the shorter side in pixels, see `load_examples`.
    """
    labels = {name: label for label, name in enumerate(classes)}
    pool = ThreadPoolExecutor(thread_name_prefix="decode")
    pending: deque[tuple[int, Future[list[Example]]]] = deque()

    def submit(position: int) -> None:
        future = pool.submit(load_examples, source, [records[position]], classes, side=side)
        pending.append((position, future))

    def decode(position: int) -> Tensor:
        if not pending or pending[0][0] != position:
            pending.clear()
            submit(position)
        for ahead in range(pending[-1][0] + 1, min(position + AHEAD, len(records))):
            submit(ahead)
        return pending.popleft()[1].result()[0].image

    try:
        yield [
            LazyExample(labels[str(record.label)], partial(decode, position))
            for position, record in enumerate(records)
        ]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
