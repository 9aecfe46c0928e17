"""Event files of TensorBoard, within the run folder: `tensorboard --logdir` shows all runs of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fedsigma.server.trackers.base import Outcome, TrackedRun

__all__ = ["TensorboardTracker"]

_FLUSH_S = 10


class TensorboardTracker:
    """Event files in `trackers/tensorboard`; a resumed run adds one to them."""

    _writer: SummaryWriter

    def start(self, run: TrackedRun, key: str) -> str:
        """Open a file, in the folder that this run has anyway."""
        self._writer = SummaryWriter(str(run.folder), flush_secs=_FLUSH_S)
        if not key:
            self._writer.add_text("parameters", _table(run.parameters))
        self._writer.add_text("tags", _table(run.tags))
        return "tensorboard"

    def metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Write them, with the round as step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)

    def final(self, values: Mapping[str, float]) -> None:
        """Write them, at step 0."""
        self.metrics(values, round=0)

    def tag(self, name: str, value: str) -> None:
        """Write it as text."""
        self._writer.add_text(f"tags/{name}", value)

    def file(self, path: Path) -> None:
        """Nothing: the files lie beside."""

    def close(self, outcome: Outcome) -> None:
        """Write what is left."""
        self._writer.add_text("tags/outcome", outcome)
        self._writer.close()


def _table(values: Mapping[str, str]) -> str:
    """A table in Markdown, as TensorBoard shows texts."""
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
