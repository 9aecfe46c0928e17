"""The runs that the dashboard shows: those of a folder of simulations, or of a server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from fedsigma.common.registry import ModelRegistry, registry_folder
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.dashboard.pages.prometheus import NEWEST, RunMetrics
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch, utc_seconds
from fedsigma.server.deployment.database import ServerDatabase, Submission
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.runs.run_dir import is_run_folder
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
        self._listed: tuple[float, list[Path]] = (-LIST_TTL_S, [])
        self._summaries: dict[Path, tuple[tuple[int, ...], RunSummary]] = {}
        self._open = lru_cache(MAX_OPEN)(RunTailer)
        self._metrics = lru_cache(2 * NEWEST)(self._compute_metrics)

    @cached_property
    def database(self) -> ServerDatabase:
        """The server's database, opened once."""
        assert self.server is not None
        return ServerDatabase(self.server.path)

    def list_runs(self) -> list[RunEntry]:
        """Return all runs, newest first."""
        entries = [self._entry(*run) for run in self._runs().items()]
        return sorted(entries, key=lambda entry: (entry.summary.started or 0.0, entry.key), reverse=True)

    def find_run(self, key: str) -> RunEntry:
        """Return one run, without reading the others.

        Raises:
            UnknownRun: There is no run with this key.
        """
        return self._entry(*self._find(key))

    def open_run(self, key: str) -> RunTailer:
        """Return the reader of a run's files, which keeps what it has parsed.

        Raises:
            UnknownRun: There is no run with this key. Keys are looked up, never joined to a path.
        """
        path, _ = self._find(key)
        if not is_run_folder(path):
            raise UnknownRun(key)
        return self._open(path)

    def collect_metrics(self) -> list[RunMetrics]:
        """Return the metrics of each run; beyond the newest runs only the summary."""
        collected = []
        for index, entry in enumerate(self.list_runs()):
            if index < NEWEST and entry.started:
                state = RunTailer(Path(entry.summary.path)).state
                collected.append(self._metrics(entry, state))
            else:
                collected.append(RunMetrics(summary=entry.summary))
        return collected

    def _compute_metrics(self, entry: RunEntry, state: tuple[int, ...]) -> RunMetrics:
        """Return the metrics of a run; `state` is part of the cache's key."""
        # Only running ones are kept parsed.
        tailer = (self._open if entry.summary.state == "running" else RunTailer)(Path(entry.summary.path))
        return RunMetrics.from_run(entry.summary, rows=tailer.rounds(), events=tailer.events())

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix() if path != self.folder else path.name

    def _find(self, key: str) -> tuple[Path, Submission | None]:
        for path, submission in self._runs().items():
            if self._key(path) == key:
                return path, submission
        raise UnknownRun(key)

    def _runs(self) -> dict[Path, Submission | None]:
        """Return the run folders, and those that submitted studies will write, with the newest submission."""
        if time.monotonic() - self._listed[0] > LIST_TTL_S:
            self._listed = time.monotonic(), find_runs(self.folder) if self.folder.is_dir() else []
        runs: dict[Path, Submission | None] = dict.fromkeys(self._listed[1])
        if self.server is not None:
            for submission in reversed(self.database.submissions()):  # the newest last
                runs[self.folder / Path(submission.folder).name] = submission
        return runs

    def _entry(self, path: Path, submission: Submission | None) -> RunEntry:
        # The listed folders may be older than a run's first file: what counts is the file.
        if submission is not None and not is_run_folder(path):
            return self._not_started(submission)
        run_id = submission.run_id if submission is not None else ""
        return RunEntry(key=self._key(path), summary=self._summary(path), run_id=run_id)

    def _not_started(self, submission: Submission) -> RunEntry:
        status = self._watch.end_status(submission.run_id) if self._watch else ""
        summary = RunSummary(
            path=submission.folder,
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
        key = Path(submission.folder).name
        return RunEntry(key=key, summary=summary, run_id=submission.run_id, started=False)

    def _summary(self, path: Path) -> RunSummary:
        tailer = RunTailer(path)
        state = tailer.state
        cached = self._summaries.get(path)
        # A crashed run changes no file, so the lock of a run that has not ended is checked every time.
        if cached is None or cached[0] != state or cached[1].state not in ("finished", "failed"):
            cached = self._summaries[path] = (state, summarize_run(tailer))
        return cached[1]
