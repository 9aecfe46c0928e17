"""Reading a run folder while it grows: only what is new is parsed."""

from __future__ import annotations

import threading
from pathlib import Path

from fedsigma.common.utils.json_lines import Row
from fedsigma.server.runs.rounds_table import latest
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["RunTailer"]

_GROWING = ("events.jsonl", "rounds.csv", "shift_magnitude.jsonl", "summary.json", "sigma.safetensors")


class RunTailer(RunDir):
    """A run folder that is read repeatedly: what was parsed once is kept as long as this object lives.

    Reads the same as `RunDir` does; safe for several threads. Not for writing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reading = threading.Lock()
        self._latest: list[Row] = []
        self._latest_of: tuple[list[Row], int] = ([], 0)

    @property
    def state(self) -> tuple[int, ...]:
        """Sizes and times of the run's files: it changes whenever one of them does."""
        state: list[int] = []
        for name in _GROWING:
            try:
                status = (self.path / name).stat()
            except FileNotFoundError:
                continue
            state += [status.st_size, status.st_mtime_ns]
        return tuple(state)

    def events(self) -> list[Row]:
        """See `RunDir.events`; without a last line that is still being written."""
        with self._reading:
            return list(self._events.follow())

    def rounds(self) -> list[Row]:
        """See `RunDir.rounds`; the rows are shared by all callers, which must not change them."""
        with self._reading:
            rows = self._rounds.follow()
            if rows is not self._latest_of[0] or len(rows) != self._latest_of[1]:
                self._latest, self._latest_of = latest(rows, "site"), (rows, len(rows))
            return list(self._latest)

    def shift_magnitudes(self) -> list[Row]:
        """See `RunDir.shift_magnitudes`."""
        with self._reading:
            return latest(self._magnitudes.follow())
