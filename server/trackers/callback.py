"""Sends what a run writes to its trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import yaml

from fedsigma.common import __version__
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.trackers import metric_names
from fedsigma.server.trackers.base import Outcome, TrackedRun, Tracker
from fedsigma.server.trackers.config import (
    STORE_FILES,
    TRACKERS,
    TrackerChoice,
    merge_choices,
    open_tracker,
)
from fedsigma.server.trackers.worker import TrackerCall, TrackerWorker

__all__ = ["TrackerCallback"]

CLOSE_TIMEOUT_S = 10.0
"""How long the end of a run waits for all its trackers."""


class TrackerCallback:
    """Sends the rounds and results of a run to trackers, which can neither stop nor delay the run.

    A resumed run keeps its earlier trackers, each with the same record, in addition to those given.

    Args:
        run_dir: Folder of the run, to which nothing has been written since it was opened.
        choices: The trackers.
        study: The study.
        run: Flower's id of the run.
    """

    def __init__(
        self, run_dir: RunDir, choices: Sequence[TrackerChoice], *, study: StudyConfig, run: str
    ) -> None:
        self._run_dir = run_dir
        self._outcome: Outcome = "interrupted"
        tags = {"study": study.name, "run": run, "fedsigma_version": __version__}
        parameters = metric_names.flatten_parameters(yaml.safe_load(study.to_yaml()))
        self._workers: list[tuple[TrackerChoice, TrackerWorker]] = []
        folder = run_dir.path / "trackers"
        with suppress(OSError):  # a run that cannot write fails on its own files
            for choice in _with_earlier(folder, choices):
                tracked = TrackedRun(
                    name=run_dir.path.name, folder=folder / choice.name, parameters=parameters, tags=tags
                )
                on_failure = partial(self._report_failure, choice.name)
                self._workers.append((choice, TrackerWorker(partial(_start, choice, tracked), on_failure)))
        if self._workers:
            run_dir.listen(self._on_event, row=self._on_row)

    def close(self) -> None:
        """Send the results and files, and wait up to `CLOSE_TIMEOUT_S` for the trackers."""
        for choice, worker in self._workers:
            worker.submit(self._log_final)
            for path in self._files(choice):
                worker.submit(methodcaller("log_file", path))
            worker.submit(methodcaller("close", self._outcome))
            worker.stop()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for _, worker in self._workers:
            worker.join(deadline)
        self._workers = []

    def _on_row(self, row: Mapping[str, Any]) -> None:
        self._submit(partial(_log_row, row=row))

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "run_end":
            self._outcome = "finished" if event["ok"] else "failed"
        elif event["kind"] == "published":
            self._submit(methodcaller("set_tag", "model", event["model"]))

    def _submit(self, call: TrackerCall) -> None:
        for _, worker in self._workers:
            worker.submit(call)

    def _log_final(self, tracker: Tracker) -> None:
        with suppress(RunDirError):
            if metrics := metric_names.final_metrics(self._run_dir.read_summary()):
                tracker.log_final(metrics)

    def _files(self, choice: TrackerChoice) -> list[Path]:
        if choice.name not in STORE_FILES:
            return []
        names = ["study.yaml", "report.html", *(["sigma.safetensors"] if choice.with_shift else [])]
        return [path for name in names if (path := self._run_dir.path / name).is_file()]

    def _report_failure(self, name: str, error: str) -> None:
        print(f"FedSigma: tracker {name} failed ({error}); the run continues", flush=True)
        with suppress(OSError):
            self._run_dir.log_event("tracker_failed", tracker=name, error=error)


def _start(choice: TrackerChoice, run: TrackedRun) -> Tracker:
    """Create and start a tracker; it resumes its record if it has one."""
    tracker = open_tracker(choice.name)
    key = tracker.start(run, _read_state(run.folder.parent, choice.name).get("key", ""))
    _write_state(run.folder.parent, choice, key=key)
    return tracker


def _with_earlier(folder: Path, choices: Sequence[TrackerChoice]) -> tuple[TrackerChoice, ...]:
    """Return the chosen trackers and those of earlier starts of the run, and store them for a resumption."""
    states = {name: _read_state(folder, name) for name in TRACKERS}
    earlier = [TrackerChoice(name, bool(state.get("sigma"))) for name, state in states.items() if state]
    merged = merge_choices((*choices, *earlier))
    for choice in merged:
        _write_state(folder, choice, key=states[choice.name].get("key", ""))
    return merged


def _read_state(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a tracker's state file; empty if it is missing or invalid."""
    try:
        state = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("key"), str) else {}


def _write_state(folder: Path, choice: TrackerChoice, *, key: str) -> None:
    text = json.dumps({"key": key, "sigma": choice.with_shift}) + "\n"
    write_atomic(folder / f"{choice.name}.json", text.encode())


def _log_row(tracker: Tracker, *, row: Mapping[str, Any]) -> None:
    if metrics := metric_names.row_metrics(row):
        tracker.log_metrics(metrics, round=row["round"])
