"""What a tracker is to a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

__all__ = ["Outcome", "TrackedRun", "Tracker"]

Outcome = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What is known of a run at its start.

    Fields: name, of its folder; folder, the tracker's own place within it; parameters, the study's settings,
    flat; tags.
    """

    name: str
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


class Tracker(Protocol):
    """One library, for one run. All its methods are called from one thread, `start` first and `close` last.

    They may raise and may take their time: neither reaches the run.
    """

    def start(self, run: TrackedRun, key: str) -> str:
        """Begin, and return a key to go on with; with a key, go on with what was begun under it."""

    def metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Take finite numbers that belong to a round."""

    def final(self, values: Mapping[str, float]) -> None:
        """Take the finite numbers of the summary."""

    def tag(self, name: str, value: str) -> None:
        """Take a tag that became known later."""

    def file(self, path: Path) -> None:
        """Take a file of the run folder."""

    def close(self, outcome: Outcome) -> None:
        """End, with everything told."""
