"""Dynamic batching: one thread owns the model and predicts images of concurrent requests together."""

from __future__ import annotations

import threading
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
    """The queue is full, or the service is stopping."""


class Batcher:
    """A bounded queue of images, and the thread that predicts them.

    An idle thread starts at once. It waits only while other images are being decoded, for `wait_s` at most,
    so that a single client never waits.

    Args:
        compute: Maps images, uint8 of shape (n, 3, size, size), to probabilities of shape (n, classes);
            called in the thread only.
        batch_size: Most images in one batch.
        wait_s: Seconds that a batch waits for images being decoded.
        queue_size: Most images in the queue.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], *, batch_size: int, wait_s: float, queue_size: int
    ) -> None:
        self._compute, self._batch_size = compute, batch_size
        self._wait_s, self._queue_size = wait_s, queue_size
        self._queue: deque[tuple[Tensor, Future[Row]]] = deque()
        self._changed = threading.Condition()
        self._expected, self._stopping = 0, False
        self._thread = threading.Thread(target=self._run, name="predict", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Accept no more images, predict the waiting ones, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether images are accepted and predicted."""
        return self._thread.is_alive() and not self._stopping

    @contextmanager
    def expect_images(self) -> Iterator[None]:
        """Announce images that are about to be submitted, so that a batch can wait for them."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, images: Sequence[Tensor]) -> list[Future[Row]]:
        """Add the images of one request to the queue, all or none.

        Args:
            images: Preprocessed images, uint8 of shape (3, size, size) each.

        Returns:
            One future an image, with its probabilities; a future may be cancelled.

        Raises:
            QueueFull: The queue is full, or the service is stopping.
        """
        futures: list[Future[Row]] = [Future() for _ in images]
        with self._changed:
            if self._stopping or len(self._queue) + len(images) > self._queue_size:
                raise QueueFull
            self._queue.extend(zip(images, futures, strict=True))
            self._changed.notify_all()
        return futures

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            batch = [(image, future) for image, future in batch if future.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                rows = self._compute(torch.stack([image for image, _ in batch])).tolist()
            except Exception as error:  # any error must reach the waiting requests
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), row in zip(batch, rows, strict=True):
                    future.set_result(tuple(row))

    def _next_batch(self) -> list[tuple[Tensor, Future[Row]]] | None:
        """Return the next batch; None when the queue is empty and the service is stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            self._changed.wait_for(
                lambda: not self._expected or len(self._queue) >= self._batch_size or self._stopping,
                timeout=self._wait_s,
            )
            if not self._queue:
                return None
            return [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
