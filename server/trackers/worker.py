"""Calls one tracker from a thread of its own, so that its errors and delays do not affect the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fedsigma.server.trackers.base import Tracker

__all__ = ["TrackerCall", "TrackerWorker"]

MAX_QUEUED = 10_000
"""Number of calls that may wait; a run of 50 sites and 100 rounds makes about half as many in total."""

TrackerCall = Callable[[Tracker], None]


class TrackerWorker:
    """Executes calls of one tracker, one after the other.

    Args:
        start: Creates and starts the tracker; called in the thread.
        on_failure: Receives the type of the first error; called from the thread, or by `stop` and `join`.
    """

    def __init__(self, start: Callable[[], Tracker], on_failure: Callable[[str], None]) -> None:
        self._start, self._on_failure = start, on_failure
        self._queue: queue.Queue[TrackerCall | None] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._failed = self._overflowed = False
        # A daemon, so that the process can exit while a tracking server does not respond.
        self._thread = threading.Thread(target=self._run, name="fedsigma-tracker", daemon=True)
        self._thread.start()

    def submit(self, call: TrackerCall) -> None:
        """Queue a call and return at once."""
        if self._overflowed or not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            # Reported by `stop`: here the run folder may be in the middle of a write.
            self._overflowed = True

    def stop(self) -> None:
        """End the thread after the queued calls."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        if self._overflowed:
            self._report("Full")

    def join(self, deadline: float) -> None:
        """Wait for the thread until the deadline, and report a timeout.

        Args:
            deadline: Time of `time.monotonic`, in seconds.
        """
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._report("TimeoutError")

    def _run(self) -> None:
        try:
            tracker = self._start()
        except BaseException as error:  # includes SystemExit by a library
            self._report(type(error).__name__)
            return
        for call in iter(self._queue.get, None):
            try:
                call(tracker)
            except BaseException as error:
                # Later calls may succeed again: a tracking server may come back.
                self._report(type(error).__name__)

    def _report(self, error: str) -> None:
        with self._lock:
            if self._failed:
                return
            self._failed = True
        self._on_failure(error)
