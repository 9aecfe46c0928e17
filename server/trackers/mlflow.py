"""Tracker for MLflow, by its REST client; nothing is logged automatically."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

# Must be set before mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from fedsigma.server.trackers.base import Outcome, TrackedRun, Tracker

__all__ = ["MlflowTracker"]

T = TypeVar("T")

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_METRICS, _MAX_PARAMETERS, _MAX_VALUE_LENGTH = 1000, 100, 6000
"""Limits of one request of MLflow's REST interface."""


class MlflowTracker(Tracker):
    """Records a run at an MLflow server.

    $MLFLOW_TRACKING_URI is the address of the server, $MLFLOW_EXPERIMENT_NAME the experiment (`fedsigma` by
    default).
    """

    def __init__(self) -> None:
        self._client = MlflowClient()
        self._run = ""

    def start(self, run: TrackedRun, key: str) -> str:
        """Create a run, or reopen the run with this id."""
        if key:
            self._client.update_run(key, status="RUNNING")
            self._run = key
            # MLflow does not allow parameters to be changed.
            self._set_tags(run.tags)
            return key
        created = self._client.create_run(_experiment_id(self._client), run_name=run.name)
        self._run = created.info.run_id
        self._set_tags(run.tags)
        params = [Param(name, value[:_MAX_VALUE_LENGTH]) for name, value in run.parameters.items()]
        for batch in _batches(params, _MAX_PARAMETERS):
            self._client.log_batch(self._run, params=batch)
        return self._run

    def log_metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Log metrics with the round as step."""
        timestamp_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, timestamp_ms, round) for name, value in values.items()]
        for batch in _batches(metrics, _MAX_METRICS):
            self._client.log_batch(self._run, metrics=batch)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._set_tags({name: value})

    def log_file(self, path: Path) -> None:
        """Upload a file as an artifact."""
        self._client.log_artifact(self._run, str(path))

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._client.set_terminated(self._run, _STATUS[outcome])

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        run_tags = [RunTag(f"fedsigma.{name}", value) for name, value in tags.items()]
        self._client.log_batch(self._run, tags=run_tags)


def _experiment_id(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedsigma"
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def _batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
