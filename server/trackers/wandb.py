"""Runs in Weights & Biases. Of what its library gathers by itself, nothing is sent."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

# Read when wandb is imported: reports of its own errors would go to its makers.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB_SILENT", "true")

import wandb

from fedsigma.server.trackers.base import Outcome, TrackedRun

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbTracker"]

_INIT_S, _FINISH_S = 15.0, 8.0


class WandbTracker:
    """One run of Weights & Biases.

    $WANDB_MODE and $WANDB_BASE_URL say where, $WANDB_PROJECT in which project, `fedsigma` by default.
    """

    _run: Run

    def start(self, run: TrackedRun, key: str) -> str:
        """Begin a run, or go on with the one of this id; the round is what its charts are over."""
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
            self.tag(name, value)
        self._run.define_metric("*", step_metric="round")
        return key

    def metrics(self, values: Mapping[str, float], *, round: int) -> None:
        """Log them with their round."""
        self._run.log({**values, "round": round})

    def final(self, values: Mapping[str, float]) -> None:
        """Put them into the run's summary."""
        self._run.summary.update(dict(values))

    def tag(self, name: str, value: str) -> None:
        """Put it into the run's configuration: a tag of W&B's is one word without a name."""
        self._run.config.update({f"fedsigma.{name}": value}, allow_val_change=True)

    def file(self, path: Path) -> None:
        """Upload it as a file of the run."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def close(self, outcome: Outcome) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def _settings() -> wandb.Settings:
    """No host, user, program, code, packages, console or load of the machine."""
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
        # Else the process would wait at its end, up to minutes, for a server that does not answer.
        init_timeout=_INIT_S,
        finish_timeout=_FINISH_S,
        finish_timeout_raises=True,
    )
