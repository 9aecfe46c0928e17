"""The runs that the dashboard shows: those of a folder of simulations, or of a server."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from fedsigma.common.registry import ModelRegistry, registry_folder
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.dashboard.pages.prometheus import NEWEST, RunMetrics
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch, utc_seconds
from fedsigma.server.deployment.database import ServerDatabase, Submission
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.runs.summary import RunSummary, find_runs, summarize_run
from fedsigma.server.runs.tail import RunTailer

__all__ = ["RunEntry", "RunIndex", "UnknownRun"]

MAX_OPEN = 32
"""Number of runs that are kept parsed; the least recently used is dropped first."""
LIST_TTL_S = 1.0
"""How long the list of run folders is cached; their files are checked every time."""


class UnknownRun(FedSigmaError, LookupError):
    """There is no such run."""


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """A run in the list of runs.

    Attributes:
        key: Path of the run folder below the index's folder; identifies the run in URLs.
        summary: State, progress and times of the run.
        run_id: Flower's id of the run; empty for a simulation.
        started: Whether the run has a folder; a submitted study has none until it starts.
    """

    key: str
    summary: RunSummary
    run_id: str = ""
    started: bool = True

    @property
    def active(self) -> bool:
        """Whether the run may still change."""
        return self.summary.state in ("running", "queued")


class RunIndex:
    """The runs below one folder.

    Args:
        folder: Folder that contains the run folders.
        server: The server whose runs they are; None for simulations.
        watch: Poller of the server's SuperLink, if there is one.
    """

    def __init__(
        self, folder: Path, *, server: ServerHome | None = None, watch: SuperLinkWatch | None = None
    ) -> None:
        self.folder = folder
        self.server = server
        self._watch = watch
        self.model_registry = ModelRegistry(server.path / "models" if server else registry_folder(folder))
        self._lock = threading.Lock()
        self._listed: tuple[float, list[Path]] = (-LIST_TTL_S, [])
        self._summaries: dict[Path, tuple[tuple[int, ...], RunSummary]] = {}
        self._open: OrderedDict[Path, RunTailer] = OrderedDict()
        self._metrics: dict[str, tuple[tuple[int, ...], RunMetrics]] = {}

    @cached_property
    def database(self) -> ServerDatabase:
        """The server's database, opened once."""
        assert self.server is not None
        return ServerDatabase(self.server.path)

    def list_runs(self) -> list[RunEntry]:
        """Return all runs, newest first."""
        entries = self._entries(self._paths())
        return sorted(entries, key=lambda entry: (entry.summary.started or 0.0, entry.key), reverse=True)

    def find_run(self, key: str) -> RunEntry:
        """Return one run, without reading the others.

        Raises:
            UnknownRun: There is no run with this key.
        """
        for entry in self._entries([path for path in self._paths() if self.key(path) == key]):
            if entry.key == key:
                return entry
        raise UnknownRun(key)

    def _entries(self, paths: list[Path]) -> list[RunEntry]:
        """Return the runs of these folders, and a server's submitted studies that have not started."""
        entries = [RunEntry(key=self.key(path), summary=self._summary(path)) for path in paths]
        if self.server is None:
            return entries
        return with_submissions(self.database, entries, self._watch)

    def open_run(self, key: str) -> RunTailer:
        """Return the reader of a run's files, which keeps what it has parsed.

        Raises:
            UnknownRun: There is no run with this key. Keys are looked up, never joined to a path.
        """
        path = {self.key(path): path for path in self._paths()}.get(key)
        if path is None:
            raise UnknownRun(key)
        with self._lock:
            tailer = self._open.setdefault(path, RunTailer(path))
            self._open.move_to_end(path)
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return tailer

    def key(self, path: Path) -> str:
        """Return the key of a run folder."""
        return path.relative_to(self.folder).as_posix() if path != self.folder else path.name

    def collect_metrics(self, *, newest: int = NEWEST) -> list[RunMetrics]:
        """Return the metrics of each run; beyond the `newest` runs only the summary."""
        collected = []
        for index, entry in enumerate(self.list_runs()):
            if index >= newest or not entry.started:
                collected.append(RunMetrics(summary=entry.summary))
                continue
            # Active runs are kept parsed; the metrics of the others are computed once.
            tailer = self.open_run(entry.key) if entry.active else RunTailer(Path(entry.summary.path))
            state = tailer.state
            cached = self._metrics.get(entry.key)
            if cached is None or cached[0] != state or cached[1].summary != entry.summary:
                metrics = RunMetrics.from_run(entry.summary, rows=tailer.rounds(), events=tailer.events())
                cached = self._metrics[entry.key] = (state, metrics)
            collected.append(cached[1])
        return collected

    def _paths(self) -> list[Path]:
        with self._lock:
            listed_at, paths = self._listed
            if time.monotonic() - listed_at > LIST_TTL_S:
                paths = find_runs(self.folder) if self.folder.is_dir() else []
                self._listed = time.monotonic(), paths
            return paths

    def _summary(self, path: Path) -> RunSummary:
        tailer = RunTailer(path)
        state = tailer.state
        cached = self._summaries.get(path)
        # A crashed run changes no file, so the lock of a run that has not ended is checked every time.
        if cached is None or cached[0] != state or cached[1].state not in ("finished", "failed"):
            cached = self._summaries[path] = (state, summarize_run(tailer))
        return cached[1]


def newest_submissions(database: ServerDatabase) -> dict[Path, Submission]:
    """Return the last submission of each run folder."""
    newest: dict[Path, Submission] = {}
    for submission in database.submissions():
        newest.setdefault(Path(submission.folder), submission)
    return newest


def with_submissions(
    database: ServerDatabase, entries: Sequence[RunEntry], watch: SuperLinkWatch | None = None
) -> list[RunEntry]:
    """Add Flower's run ids to the runs, and the submitted studies that have not started.

    Args:
        database: The server's database.
        entries: The runs.
        watch: Poller of the server's SuperLink, if there is one.
    """
    submissions = newest_submissions(database)
    runs = [
        replace(entry, run_id=submissions.pop(path).run_id)
        if (path := Path(entry.summary.path)) in submissions
        else entry
        for entry in entries
    ]
    return runs + [
        _submitted(path, submission, watch) for path, submission in submissions.items() if not path.exists()
    ]


def _submitted(path: Path, submission: Submission, watch: SuperLinkWatch | None) -> RunEntry:
    status = watch.end_status(submission.run_id) if watch else ""
    summary = RunSummary(
        path=str(path),
        study=submission.study,
        state="failed" if status else "queued",
        reason=f"the run did not start: {status}" if status else "",
        rounds_done=0,
        rounds_planned=None,
        sites=0,
        federated_accuracy=None,
        started=utc_seconds(submission.submitted_at),
        seconds=None,
    )
    return RunEntry(key=path.name, summary=summary, run_id=submission.run_id, started=False)
