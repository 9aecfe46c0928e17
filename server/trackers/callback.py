"""Following a run folder, and telling its trackers what is written there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedsigma.common import __version__
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.trackers import metric_names
from fedsigma.server.trackers.base import Outcome, TrackedRun, Tracker
from fedsigma.server.trackers.config import KNOWN, TrackerChoice, open_tracker
from fedsigma.server.trackers.worker import Delivery, TrackerWorker

__all__ = ["Tracking"]

PATIENCE_S = 10.0
"""How long the end of a run waits for its trackers, all together."""


class Tracking:
    """Tells trackers the rounds and results of a run. None of them can stop or delay it.

    A resumed run goes on with the trackers that it had, each in the same run of its own, besides those given.

    Args:
        folder: the run's, to which nothing was written since it was opened.
        chosen: the trackers.
        study, run: the study, and the run's number.
    """

    def __init__(
        self, folder: RunDir, chosen: Sequence[TrackerChoice], *, study: StudyConfig, run: str
    ) -> None:
        self._folder = folder
        self._outcome: Outcome = "interrupted"
        tags = {"study": study.name, "run": run, "fedsigma_version": __version__}
        told = metric_names.parameters(yaml.safe_load(study.to_yaml()))
        self._couriers: list[tuple[TrackerChoice, TrackerWorker]] = []
        with suppress(OSError):  # a run that cannot write finds out by its own files
            for choice in _with_earlier(folder.path, chosen):
                place = folder.path / "trackers" / choice.name
                tracked = TrackedRun(name=folder.path.name, folder=place, parameters=told, tags=tags)
                failed = partial(self._failed, choice.name)
                self._couriers.append((choice, TrackerWorker(partial(_begin, choice, tracked), failed)))
        if self._couriers:
            folder.listen(self._event, row=self._row)

    def close(self) -> None:
        """Tell the results and the files, and wait some seconds for the trackers to take them."""
        for choice, courier in self._couriers:
            courier.tell(self._results)
            for path in self._files(choice):
                courier.tell(partial(_file, path=path))
            courier.tell(partial(_close, outcome=self._outcome))
            courier.finish()
        until = time.monotonic() + PATIENCE_S
        for _, courier in self._couriers:
            courier.wait(until)
        self._couriers = []

    def _row(self, row: Mapping[str, Any]) -> None:
        self._tell(partial(_metrics, row=row))

    def _event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "run_end":
            self._outcome = "finished" if event["ok"] else "failed"
        elif event["kind"] == "published":
            self._tell(partial(_tag, name="model", value=event["model"]))

    def _tell(self, delivery: Delivery) -> None:
        for _, courier in self._couriers:
            courier.tell(delivery)

    def _results(self, tracker: Tracker) -> None:
        with suppress(RunDirError):
            if figures := metric_names.final_figures(self._folder.read_summary()):
                tracker.final(figures)

    def _files(self, choice: TrackerChoice) -> list[Path]:
        if not KNOWN[choice.name].keeps_files:
            return []
        wanted = ["study.yaml", "report.html", *(["sigma.safetensors"] if choice.sigma else [])]
        return [self._folder.path / name for name in wanted if (self._folder.path / name).is_file()]

    def _failed(self, name: str, error: str) -> None:
        print(f"FedSigma: tracker {name} failed ({error}); the run goes on", flush=True)
        with suppress(OSError):
            self._folder.log_event("tracker_failed", tracker=name, error=error)


def _begin(choice: TrackerChoice, run: TrackedRun) -> Tracker:
    """Make a tracker and start it, or go on with what it began earlier."""
    tracker = open_tracker(choice.name)
    begun = tracker.start(run, _read(run.folder.parent, choice.name).get("key", ""))
    _write(run.folder.parent, choice, key=begun)
    return tracker


def _with_earlier(path: Path, chosen: Sequence[TrackerChoice]) -> list[TrackerChoice]:
    """The chosen trackers, and those that the run had; each is noted for the time when it is resumed."""
    place, found = path / "trackers", {one.name: one for one in chosen}
    for name in KNOWN:
        if earlier := _read(place, name):
            sigma = bool(earlier.get("sigma")) or (name in found and found[name].sigma)
            found[name] = TrackerChoice(name, sigma)
    for one in found.values():
        _write(place, one, key=_read(place, one.name).get("key", ""))
    return list(found.values())


def _read(place: Path, name: str) -> dict[str, Any]:
    """What a tracker's file says; nothing if there is none, or it does not read."""
    try:
        told = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("key"), str) else {}


def _write(place: Path, choice: TrackerChoice, *, key: str) -> None:
    text = json.dumps({"key": key, "sigma": choice.sigma}) + "\n"
    write_atomic(place / f"{choice.name}.json", text.encode())


def _metrics(tracker: Tracker, *, row: Mapping[str, Any]) -> None:
    if told := metric_names.row_metrics(row):
        tracker.metrics(told, round=row["round"])


def _tag(tracker: Tracker, *, name: str, value: str) -> None:
    tracker.tag(name, value)


def _file(tracker: Tracker, *, path: Path) -> None:
    tracker.file(path)


def _close(tracker: Tracker, *, outcome: Outcome) -> None:
    tracker.close(outcome)
