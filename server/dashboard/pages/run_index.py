"""What the dashboard can show: the runs of a folder of simulations, or those of a server."""

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
from fedsigma.server.dashboard.pages.prometheus import NEWEST, RunFigures
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch, utc_seconds
from fedsigma.server.deployment.database import ServerDatabase, Submission
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.runs.summary import RunSummary, find_runs, summarize_run
from fedsigma.server.runs.tail import RunTailer

__all__ = ["RunIndex", "RunLine", "UnknownRun"]

MOST_OPEN = 32
"""How many runs are kept parsed; the one that was looked at longest ago goes first."""
LISTED_S = 1.0
"""How long a list of the run folders counts; what is in them is looked at every time."""


class UnknownRun(FedSigmaError, LookupError):
    """There is no such run here."""


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run in the list.

    key: its folder's path below the library's, which is its address in the pages. For a study that was
    submitted and has not begun (`begun`) there is no folder yet; `run_id` is Flower's number of it.
    """

    key: str
    run: RunSummary
    run_id: str = ""
    begun: bool = True

    @property
    def open(self) -> bool:
        """Whether it may still change by itself."""
        return self.run.state in ("running", "queued")


class RunIndex:
    """The runs below one folder.

    Args:
        runs: the folder that holds the run folders.
        server: the server whose runs they are; None for simulations.
        watch: what the server's SuperLink says of runs; None where nobody asks it.
    """

    def __init__(
        self, runs: Path, *, server: ServerHome | None = None, watch: SuperLinkWatch | None = None
    ) -> None:
        self.runs = runs
        self.server = server
        self._watch = watch
        self.shelf = ModelRegistry(server.path / "models" if server else registry_folder(runs))
        self._lock = threading.Lock()
        self._listed: tuple[float, list[Path]] = (-LISTED_S, [])
        self._overviews: dict[Path, tuple[tuple[int, ...], RunSummary]] = {}
        self._open: OrderedDict[Path, RunTailer] = OrderedDict()
        self._figures: dict[str, tuple[tuple[int, ...], RunFigures]] = {}

    @cached_property
    def registry(self) -> ServerDatabase:
        """The database of the server, opened once."""
        assert self.server is not None
        return ServerDatabase(self.server.path / "server.db")

    def lines(self) -> list[RunLine]:
        """All runs, the newest first."""
        found = self._lines(self._paths())
        return sorted(found, key=lambda line: (line.run.started or 0.0, line.key), reverse=True)

    def line(self, key: str) -> RunLine:
        """One run of the list; the others are not looked at.

        Raises:
            UnknownRun: there is none of this key.
        """
        for line in self._lines([path for path in self._paths() if self.key(path) == key]):
            if line.key == key:
                return line
        raise UnknownRun(key)

    def _lines(self, paths: list[Path]) -> list[RunLine]:
        """These runs, and what a server has that has not begun."""
        found = [RunLine(key=self.key(path), run=self._overview(path)) for path in paths]
        if self.server is None:
            return found
        return with_submissions(self.registry, found, self._watch)

    def run(self, key: str) -> RunTailer:
        """The files of a run, as far as they were parsed before.

        Raises:
            UnknownRun: there is none of this key; keys are looked up, never joined to a path.
        """
        path = {self.key(path): path for path in self._paths()}.get(key)
        if path is None:
            raise UnknownRun(key)
        with self._lock:
            found = self._open.setdefault(path, RunTailer(path))
            self._open.move_to_end(path)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return found

    def key(self, path: Path) -> str:
        """The address of a run folder."""
        return path.relative_to(self.runs).as_posix() if path != self.runs else path.name

    def figures(self, *, newest: int = NEWEST) -> list[RunFigures]:
        """What metrics tell of each run; of the runs after the newest ones, their overview alone."""
        found = []
        for number, line in enumerate(self.lines()):
            if number >= newest or not line.begun:
                found.append(RunFigures(overview=line.run))
                continue
            # Those that change are kept parsed; of those that ended, what was counted once is enough.
            folder = self.run(line.key) if line.open else RunTailer(Path(line.run.path))
            state = folder.state
            known = self._figures.get(line.key)
            if known is None or known[0] != state or known[1].overview != line.run:
                made = RunFigures.of(line.run, rows=folder.rounds(), events=folder.events())
                known = self._figures[line.key] = (state, made)
            found.append(known[1])
        return found

    def _paths(self) -> list[Path]:
        with self._lock:
            listed, paths = self._listed
            if time.monotonic() - listed > LISTED_S:
                paths = find_runs(self.runs) if self.runs.is_dir() else []
                self._listed = time.monotonic(), paths
            return paths

    def _overview(self, path: Path) -> RunSummary:
        folder = RunTailer(path)
        state = folder.state
        known = self._overviews.get(path)
        # A run that dies changes no file, so one that has not ended is asked about every time.
        if known is None or known[0] != state or known[1].state not in ("finished", "failed"):
            known = self._overviews[path] = (state, summarize_run(folder))
        return known[1]


def newest_submissions(registry: ServerDatabase) -> dict[Path, Submission]:
    """The last submission of each run folder."""
    found: dict[Path, Submission] = {}
    for one in registry.submissions():
        found.setdefault(Path(one.folder), one)
    return found


def with_submissions(
    registry: ServerDatabase, lines: Sequence[RunLine], watch: SuperLinkWatch | None = None
) -> list[RunLine]:
    """Give each run its number at the SuperLink, and add the studies that have not begun."""
    made = newest_submissions(registry)
    found = [
        replace(line, run_id=made.pop(path).run_id) if (path := Path(line.run.path)) in made else line
        for line in lines
    ]
    return found + [_waiting(path, one, watch) for path, one in made.items() if not path.exists()]


def _waiting(path: Path, one: Submission, watch: SuperLinkWatch | None) -> RunLine:
    ended = watch.ended(one.run_id) if watch else ""
    about = RunSummary(
        path=str(path),
        study=one.study,
        state="failed" if ended else "queued",
        reason=f"it did not begin: {ended}" if ended else "",
        rounds_done=0,
        rounds_planned=None,
        sites=0,
        federated_accuracy=None,
        started=utc_seconds(one.submitted_at),
        seconds=None,
    )
    return RunLine(key=path.name, run=about, run_id=one.run_id, begun=False)
