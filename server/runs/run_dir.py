"""The folder of one run: its study, what happened, and its results.

A run may be killed at any moment, so no file is ever left half-written. `events.jsonl`, `rounds.csv` and
`shift_magnitude.jsonl` grow by whole lines; all other files are replaced in one step. The files and their
fields are described in `docs/run-folder.md`.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic
from fedsigma.common.utils.json_lines import JsonLines, Row, to_json
from fedsigma.server.runs import lock
from fedsigma.server.runs.rounds_table import RoundsTable, latest

if TYPE_CHECKING:  # torch is slow to import and only the sigma file needs it
    from fedsigma.common.registry.shift_file import SavedShift

__all__ = ["RunDir", "RunDirError", "check_free", "is_run_folder"]


class RunDirError(FedSigmaError, ValueError):
    """A run folder is missing, already in use, or not a run folder."""


class RunDir:
    """One run's files, to write them while it runs and to read them at any time.

    Opening a folder changes nothing in it, so a run can be watched while another process writes it. The
    methods that append may be called from several threads of one process; only one process may write.

    Attributes:
        path: The run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._events = JsonLines(path / "events.jsonl", fields={"kind": str}, report_damage=True)
        self._rounds = RoundsTable(path / "rounds.csv")
        self._magnitudes = JsonLines(path / "shift_magnitude.jsonl", fields={"round": int, "towers": dict})
        self._event_listeners: list[Callable[[Row], None]] = []
        self._row_listeners: list[Callable[[Row], None]] = []

    @classmethod
    def create(cls, path: Path, study_yaml: str) -> RunDir:
        """Create a run folder, which holds the study as resolved, YAML text.

        Raises:
            RunDirError: The folder already holds a run, or the path is a file.
        """
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run_dir = cls(path)
        run_dir._replace("study.yaml", study_yaml)
        return run_dir

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open a run folder, to read it or to resume its run.

        Raises:
            RunDirError: The folder holds no run.
        """
        if not is_run_folder(path):
            what = "holds no study.yaml, so it is not a run folder" if path.is_dir() else "does not exist"
            raise RunDirError(f"{path} {what}: list the run folders with `fedsigma runs`")
        return cls(path)

    @property
    def key(self) -> str:
        """Key by which sites know this run, 16 hex digits: drawn at first use and kept in the folder.

        It does not derive from the path: a folder may be moved before its run is resumed, and another one
        may take its path.
        """
        if not (self.path / "key.txt").exists():
            self._replace("key.txt", secrets.token_hex(8))
        return (self.path / "key.txt").read_text(encoding="ascii").strip()

    @property
    def study_yaml(self) -> str:
        """The study as the server resolved it, YAML text."""
        return (self.path / "study.yaml").read_text(encoding="utf-8")

    @property
    def report_path(self) -> Path:
        """Path of this run's report, which may not exist yet."""
        return self.path / "report.html"

    @property
    def shift_path(self) -> Path:
        """Path of the sigma shift of the last finished round, which may not exist yet."""
        return self.path / "sigma.safetensors"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that writes this folder, until the end of the block or of the process.

        Raises:
            RunDirError: Another process writes it.
        """
        try:
            with lock.acquire(self.path / "run.lock"):
                yield
        except lock.Timeout:
            raise RunDirError(
                f"{self.path} is written by a run that is still running: wait until it ends, or stop it first"
            ) from None

    @property
    def locked(self) -> bool:
        """Whether a living process writes this folder; see `lock` for file systems without locks."""
        return lock.is_locked(self.path / "run.lock")

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append one event with the present time.

        Args:
            kind: One of the kinds in `docs/run-folder.md`.
            **fields: Numbers, text, lists and mappings; a number that is not finite is written as null.

        Raises:
            TypeError: A value cannot be written as JSON, or a field is named `time`.
        """
        if "time" in fields:
            raise TypeError(f"event {kind!r} has a field named time: the time is set by log_event")
        event = {"time": round(time.time(), 3), "kind": kind, **fields}
        with self._lock:
            self._events.append(event)
            for listener in self._event_listeners:
                listener(event)

    def listen(
        self, event: Callable[[Row], None] | None = None, *, row: Callable[[Row], None] | None = None
    ) -> None:
        """Call `event` with each further event, and `row` with each row of a round, after it was written.

        An exception of a listener is raised to the writer. A listener must not write into this folder.
        """
        if event is not None:
            self._event_listeners.append(event)
        if row is not None:
            self._row_listeners.append(row)

    def events(self) -> list[Row]:
        """Return all events in the order in which they were written.

        A last line cut short by a crash is left out. A damaged line elsewhere appears as an event of kind
        `unreadable_line` with its number in `line`.
        """
        return self._events.read()

    def log_round(
        self,
        round: int,
        site: str,
        metrics: Mapping[str, float],
        bytes_up: int,
        bytes_down: int,
        status: str,
        reason: str = "",
    ) -> None:
        """Append the result of one site, or of `ALL_SITES`, in one round.

        Args:
            round: Number of the round, from 1.
            site: The site's name.
            metrics: Values by name.
            bytes_up: Bytes from the site to the server.
            bytes_down: Bytes from the server to the site.
            status: `accepted`, `rejected`, `late` or `failed`; `all sites` in the row of all sites.
            reason: Why a reply does not count.

        Raises:
            ValueError: A metric's name cannot be that of a column.
        """
        row: Row = {"round": int(round), "site": site, "status": status, "reason": reason}
        row |= {"bytes_up": int(bytes_up), "bytes_down": int(bytes_down)}
        if clash := row.keys() & metrics.keys():
            raise ValueError(f"metric {min(clash)!r} of site {site!r} cannot be a column of rounds.csv")
        row |= metrics
        with self._lock:
            self._rounds.append(row)
            for listener in self._row_listeners:
                listener(row)

    def rounds(self) -> list[Row]:
        """Return the rows of `rounds.csv` by round; of several rows of one round and site, the last one.

        Every row has the keys `round`, `site`, `status`, `bytes_up`, `bytes_down`, `reason` and every
        metric of the file, None where the site sent none.
        """
        return latest(self._rounds.read(), "site")

    def log_shift_magnitude(self, round: int, towers: Mapping[str, Any]) -> None:
        """Append where the shift of a round is large, from `shift_magnitude.to_towers`."""
        with self._lock:
            self._magnitudes.append({"round": int(round), "towers": towers})

    def shift_magnitudes(self) -> list[Row]:
        """Return the lines of `shift_magnitude.jsonl`, `round` and `towers`; the last one of each round."""
        return latest(self._magnitudes.read())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results of the run; numbers that are not finite become null."""
        self._replace("summary.json", to_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """Return the results of the run; empty while there are none.

        Raises:
            RunDirError: The file is not a JSON object.
        """
        path = self.path / "summary.json"
        if not path.is_file():
            return {}
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirError(f"{path} is not valid JSON ({error}): restore a copy or run again") from error
        if not isinstance(summary, dict):
            raise RunDirError(f"{path} holds a {type(summary).__name__}, expected an object: run again")
        return summary

    def load_shift(self) -> SavedShift:
        """Return the sigma shift of the last finished round.

        Raises:
            ShiftFileError: No round has produced one yet, or the file is damaged.
        """
        from fedsigma.common.registry.shift_file import load_shift

        return load_shift(self.shift_path)

    def _replace(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode("utf-8"))


def is_run_folder(path: Path) -> bool:
    """Return whether a run has started in this folder: its study is there."""
    return (path / "study.yaml").is_file()


def check_free(path: Path) -> None:
    """Check that a new run may use this folder.

    Raises:
        RunDirError: It already holds a run, or the path is a file.
    """
    if is_run_folder(path):
        raise RunDirError(
            f"{path} already holds a run: name another folder, or resume that run (resume=true)"
        )
    if path.exists() and not path.is_dir():
        raise RunDirError(f"{path} is a file, expected a folder: name another path")
