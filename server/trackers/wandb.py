"""Tracker for Weights & Biases. Its library's own data collection is disabled."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# Must be set before wandb is imported; it would send error reports to its vendor.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from fedsigma.server.trackers.base import Outcome, TrackedRun, Tracker

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbTracker"]

_INIT_TIMEOUT_S, _FINISH_TIMEOUT_S = 15.0, 8.0


class WandbTracker(Tracker):
    """Records a run at Weights & Biases.

    $WANDB_MODE and $WANDB_BASE_URL select the server, $WANDB_PROJECT the project (`fedsigma` by default).
    """

    _run: Run

    def start(self, run: TrackedRun, key: str) -> str:
        """Create a run, or resume the run with this id; charts have the round as x axis."""
        key = key or secrets.token_hex(8)
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=key,
            name=run.name,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or "fedsigma",
            config=dict(run.parameters),
            tags=[f"study:{run.tags['study']}"[:64]],
            dir=str(run.folder),
            settings=_settings(),
        )
        for name, value in run.tags.items():
            self.set_tag(name, value)
        self._run.define_metric("*", step_metric="round")
        return key

    def log_metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Log metrics with their round."""
        self._run.log({**values, "round": round})

    def log_final(self, values: Mapping[str, float]) -> None:
        """Write metrics to the run's summary."""
        self._run.summary.update(dict(values))

    def set_tag(self, name: str, value: str) -> None:
        """Write a tag to the run's configuration, because tags of W&B have no names."""
        self._run.config.update({f"fedsigma.{name}": value}, allow_val_change=True)  # type: ignore[no-untyped-call]

    def log_file(self, path: Path) -> None:
        """Upload a file of the run."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def _settings() -> wandb.Settings:
    """Return settings that collect no host, user, program, code, packages, console or system metrics."""
    return wandb.Settings(
        silent=True,
        console="off",
        host="",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        # Otherwise the process could wait for minutes at its end for a server that does not respond.
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )
