"""One thread that owns the model and judges together what arrives together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["Batcher", "QueueFull"]

Row = tuple[float, ...]


class QueueFull(FedSigmaError):
    """The queue takes no more images, or the service is stopping."""


class Batcher:
    """A bounded queue of images and the thread that judges them.

    An idle thread takes what there is at once. Only while other images are being decoded does it wait for
    them, for `wait_s` at most: one client alone never waits.

    Args:
        compute: from images, uint8 (n, 3, size, size), to probabilities (n, classes); called by the thread
            alone.
        batch: images judged together at most.
        wait_s: seconds.
        waiting: images in the queue at most.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], *, batch_size: int, wait_s: float, queue_size: int
    ) -> None:
        self._compute, self._batch_size, self._wait_s, self._queue_size = (
            compute,
            batch_size,
            wait_s,
            queue_size,
        )
        self._queue: deque[tuple[Tensor, Future[Row]]] = deque()
        self._changed = threading.Condition()
        self._expected, self._stopping = 0, False
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more images, judge those that wait, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether images are taken and judged."""
        return self._thread.is_alive() and not self._stopping

    @contextmanager
    def expect_images(self) -> Iterator[None]:
        """Say that images are about to be submitted, which a batch may wait for."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, images: Sequence[Tensor]) -> list[Future[Row]]:
        """Put the images of one request into the queue, all or none of them.

        Returns one future for each, with its probabilities; a future may be cancelled.

        Raises:
            Full: there is no room, or the service is stopping.
        """
        futures: list[Future[Row]] = [Future() for _ in images]
        with self._changed:
            if self._stopping or len(self._queue) + len(images) > self._queue_size:
                raise QueueFull
            self._queue.extend(zip(images, futures, strict=True))
            self._changed.notify_all()
        return futures

    def _run(self) -> None:
        while (taken := self._next_batch()) is not None:
            wanted = [(image, future) for image, future in taken if future.set_running_or_notify_cancel()]
            if not wanted:
                continue
            try:
                found = self._compute(torch.stack([image for image, _ in wanted])).tolist()
            except Exception as error:  # whatever it is, those who wait must hear of it
                for _, future in wanted:
                    future.set_exception(error)
            else:
                for (_, future), row in zip(wanted, found, strict=True):
                    future.set_result(tuple(row))

    def _next_batch(self) -> list[tuple[Tensor, Future[Row]]] | None:
        """The next batch; None when there is none and will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            end = time.monotonic() + self._wait_s
            while self._expected and len(self._queue) < self._batch_size and not self._stopping:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if not self._queue:
                return None
            return [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
