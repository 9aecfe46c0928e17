"""Runs in MLflow, by its REST client: nothing is recorded but what is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

# Read when mlflow is imported: what is used here is nobody's business but this server's.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from fedsigma.server.trackers.base import Outcome, TrackedRun

__all__ = ["MlflowTracker"]

T = TypeVar("T")

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# What one request may hold, by MLflow's REST interface.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST = 1000, 100, 6000


class MlflowTracker:
    """One run of an MLflow server.

    $MLFLOW_TRACKING_URI says where, $MLFLOW_EXPERIMENT_NAME in which experiment, `fedsigma` by default.
    """

    def __init__(self) -> None:
        self._client = MlflowClient()
        self._run = ""

    def start(self, run: TrackedRun, key: str) -> str:
        """Create a run, or open the one of this id again."""
        if key:
            self._client.update_run(key, status="RUNNING")
            self._run = key
            # Parameters are those of the first time: MLflow changes none.
            self._tags(run.tags)
            return key
        made = self._client.create_run(_experiment(self._client), run_name=run.name)
        self._run = made.info.run_id
        self._tags(run.tags)
        told = [Param(name, value[:_LONGEST]) for name, value in run.parameters.items()]
        for some in _parts(told, _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=some)
        return self._run

    def metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Log them, with the round as step."""
        now = int(time.time() * 1000)
        told = [Metric(name, value, now, round) for name, value in values.items()]
        for some in _parts(told, _MOST_METRICS):
            self._client.log_batch(self._run, metrics=some)

    def final(self, values: Mapping[str, float]) -> None:
        """Log them, at step 0."""
        self.metrics(values, round=0)

    def tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._tags({name: value})

    def file(self, path: Path) -> None:
        """Upload it as an artefact."""
        self._client.log_artifact(self._run, str(path))

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._client.set_terminated(self._run, _STATUS[outcome])

    def _tags(self, tags: Mapping[str, str]) -> None:
        told = [RunTag(f"fedsigma.{name}", value) for name, value in tags.items()]
        self._client.log_batch(self._run, tags=told)


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedsigma"
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _parts(values: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), most):
        yield values[start : start + most]
