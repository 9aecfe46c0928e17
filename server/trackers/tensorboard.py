"""Tracker for TensorBoard: event files in the run folder, for `tensorboard --logdir`."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from fedsigma.server.trackers.base import Outcome, TrackedRun, Tracker

__all__ = ["TensorboardTracker"]

_FLUSH_S = 10


class TensorboardTracker(Tracker):
    """Writes event files to `trackers/tensorboard`; a resumed run adds another file."""

    _writer: SummaryWriter

    def start(self, run: TrackedRun, key: str) -> str:
        """Open an event file in the tracker's folder; resuming needs no key."""
        self._writer = SummaryWriter(str(run.folder), flush_secs=_FLUSH_S)
        if not key:
            self._writer.add_text("parameters", _table(run.parameters))
        self._writer.add_text("tags", _table(run.tags))
        return "tensorboard"

    def log_metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Write metrics with the round as step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def set_tag(self, name: str, value: str) -> None:
        """Write a tag as text."""
        self._writer.add_text(f"tags/{name}", value)

    def close(self, outcome: Outcome) -> None:
        """Write pending values and close the file."""
        self._writer.add_text("tags/outcome", outcome)
        self._writer.close()


def _table(values: Mapping[str, str]) -> str:
    """Return a Markdown table, which TensorBoard renders."""
    cells = {name: " ".join(value.replace("|", "\\|").split()) for name, value in values.items()}
    rows = [f"| {name} | {cell} |" for name, cell in cells.items()]
    return "\n".join(["| name | value |", "|---|---|", *rows])
