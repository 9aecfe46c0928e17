"""The interface of experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

__all__ = ["Outcome", "TrackedRun", "Tracker"]

Outcome = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What is known about a run at its start.

    Attributes:
        name: Name of the run folder.
        folder: The tracker's folder within the run folder.
        parameters: The study's settings, flattened.
        tags: Tags of the run.
    """

    name: str
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


class Tracker(Protocol):
    """Records one run with one tracking library.

    All methods are called from one thread, `start` first and `close` last. Their errors and delays do not
    affect the run.
    """

    def start(self, run: TrackedRun, key: str) -> str:
        """Start recording and return a key that identifies the record; a non-empty `key` resumes a record."""

    def log_metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Log finite metrics of a round."""

    def log_final(self, values: Mapping[str, float]) -> None:
        """Log finite metrics of the summary, at step 0 unless the library has a summary of its own."""
        self.log_metrics(values, round=0)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag that became known during the run."""

    def log_file(self, path: Path) -> None:
        """Store a file of the run folder; only called for trackers in `STORE_FILES`."""

    def close(self, outcome: Outcome) -> None:
        """Stop recording, after everything has been sent."""
