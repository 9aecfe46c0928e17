"""Runs of studies for benchmarks: by Flower's simulation, or in this process; finished runs are reused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from fedsigma.common.config.study import StudyConfig
from fedsigma.server.app import app as server
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.simulate import run_simulation

REAL_STUDIES = ("white-cells-four-labs", "dermoscopy-four-sites")
"""The bundled studies on real images."""


def run_study(study: StudyConfig, folder: Path, *, seed: int, rounds: int = 0) -> dict[str, Any]:
    """Return the summary of a study's run by `flwr run`, unless finished before; resume an interrupted one.

    Args:
        study: The study; its file is written beside the folder.
        folder: The run folder.
        seed: Replaces the study's seed.
        rounds: Replaces the study's rounds, unless 0.
    """
    if not _is_finished(study, folder):
        file = _write_study(study, folder)
        resume = (folder / "study.yaml").exists()
        if code := run_simulation(str(file), out=folder, seed=seed, rounds=rounds, resume=resume):
            raise SystemExit(f"the run {folder} ended with code {code}: see its events.jsonl")
    return RunDir.open(folder).read_summary()


def run_in_process(study: StudyConfig, folder: Path, grid: Grid) -> RunDir:
    """Run the real ServerApp on a grid in this process, unless the run was finished before."""
    if not _is_finished(study, folder):
        config: dict[str, Any] = {"study": str(_write_study(study, folder)), "out": str(folder)}
        config |= {"resume": False, "seed": -1, "rounds": 0}
        os.environ["FEDSIGMA_AUDIT"] = str(folder.parent / "audit")
        server(grid, Context(1, 1, {}, RecordDict(), config))
    return RunDir.open(folder)


def _is_finished(study: StudyConfig, folder: Path) -> bool:
    if not (folder / "summary.json").exists():
        return False
    return set(study.baselines) <= RunDir.open(folder).read_summary().keys()


def _write_study(study: StudyConfig, folder: Path) -> Path:
    file = folder.with_name(f"{folder.name}.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(study.to_yaml(), encoding="utf-8")
    return file
