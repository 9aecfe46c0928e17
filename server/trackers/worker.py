"""Telling one tracker, from a thread of its own, so that neither its errors nor its silence reach the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fedsigma.server.trackers.base import Tracker

__all__ = ["TrackerWorker"]

MOST_WAITING = 10_000
"""Deliveries that may wait; a run of 50 sites and 100 rounds makes about half as many in all."""

Delivery = Callable[[Tracker], None]


class TrackerWorker:
    """Carries deliveries to one tracker, one after the other.

    Args:
        begin: makes the tracker and starts it; called in the thread.
        failed: told the type of what went wrong, at most once; from the thread, or by `finish`.
    """

    def __init__(self, begin: Callable[[], Tracker], failed: Callable[[str], None]) -> None:
        self._begin, self._failed = begin, failed
        self._waiting: queue.Queue[Delivery | None] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._noted = self._overflowed = False
        # A daemon, for a process must end although a server never answers.
        self._thread = threading.Thread(target=self._work, name="fedsigma-tracker", daemon=True)
        self._thread.start()

    def tell(self, delivery: Delivery) -> None:
        """Leave a delivery and return at once."""
        if self._overflowed or not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(delivery)
        except queue.Full:
            # Noted at the end: here the run folder may be writing, and this is told by it.
            self._overflowed = True

    def finish(self) -> None:
        """Say that nothing more comes: the thread ends after what is waiting."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        if self._overflowed:
            self._note("Full")

    def wait(self, until: float) -> None:
        """Wait for the thread, at most until then, by `time.monotonic`; that it did not end is noted."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._note("TimeoutError")

    def _work(self) -> None:
        try:
            tracker = self._begin()
        except BaseException as error:  # a library's sys.exit() must not go unnoted, either
            self._note(type(error).__name__)
            return
        for delivery in iter(self._waiting.get, None):
            try:
                delivery(tracker)
            except BaseException as error:
                # What comes next may arrive all the same: a server comes back.
                self._note(type(error).__name__)

    def _note(self, what: str) -> None:
        with self._lock:
            if self._noted:
                return
            self._noted = True
        self._failed(what)
