"""Run one cell: train in one place or at sites, and evaluate on the test images."""

from __future__ import annotations

import importlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.loading import Example, load_examples
from fedsigma.common.data.sampling import few_shot
from fedsigma.common.data.sources.site_data import NoImages, load_sites, simulated_sites
from fedsigma.common.training.trainer import Trainer, open_trainer
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.evaluation.baselines import train_pooled
from fedsigma.server.federation import checkpoint
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.rounds import train
from fedsigma.server.federation.site_sampling import total_steps
from fedsigma.server.paper.lazy_images import LazyExamples
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.in_process import InProcessGrid

__all__ = ["CellResult", "Score", "run_cell"]

Vector = NDArray[np.float32]
CLIENT_APP = "fedsigma.clientapp"
"""Module of the sites' app, loaded by name: the server does not import the site's code."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Metrics of a model on one set.

    Attributes:
        judged_on: Name of the set.
        half: `base` or `novel`; empty for all classes.
        images: Number of test images.
        scores: Metrics by name, 0 to 1.
    """

    judged_on: str
    half: str
    images: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """Result of a cell.

    Attributes:
        scores: Metrics by set and half.
        sites: Sites that trained; 1 for one place, 0 for no training.
        examples: Training images of all sites.
        steps: Optimiser steps of one site.
        bytes_up: Bytes that one site uploads in one round.
        seconds: Duration.
    """

    scores: tuple[Score, ...]
    sites: int
    examples: int
    steps: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A trained model; the numbers are those of `CellResult`."""

    shift: Vector
    sites: int = 0
    examples: int = 0
    steps: int = 0
    bytes_up: int = 0

    def save(self, file: Path) -> None:
        """Write the shift, with the numbers as metadata."""
        numbers = {name: str(value) for name, value in vars(self).items() if name != "shift"}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, to_bytes({"shift": self.shift}, metadata=numbers))

    @classmethod
    def load(cls, file: Path) -> _Trained:
        """Read what `save` wrote."""
        with safe_open(file, framework="np") as tensors:
            numbers = {name: int(value) for name, value in tensors.metadata().items()}
            return cls(shift=tensors.get_tensor("shift"), **numbers)


def run_cell(
    cell: Cell, study: StudyConfig, sets: Mapping[str, PublishedSet], folder: Path, judge_on: Sequence[str]
) -> CellResult:
    """Train a cell's model, unless it was trained before or needs no training, and evaluate it.

    Args:
        cell: The cell.
        study: Its study, from `build_study`.
        sets: Sets by name, including those that the cell is trained and evaluated on.
        folder: Run folder of a federated cell, resumed if it was interrupted. A model that is evaluated on
            several sets is stored beside it.
        judge_on: Names of the cell's sets to evaluate on.

    Raises:
        DataError: Images cannot be read, or cannot be divided as in the setting.
        TrainingError: Training diverged.
    """
    start = time.monotonic()
    model_file = folder.with_name(f"{folder.name}.safetensors")
    if model_file.is_file():
        trained = _Trained.load(model_file)
    else:
        trained = _train(cell, study, sets[cell.trained_on], folder)
        if len(cell.judged_on) > 1:
            trained.save(model_file)
    scores = tuple(score for name in judge_on for score in _evaluate(trained.shift, cell, study, sets[name]))
    return CellResult(
        scores=scores,
        sites=trained.sites,
        examples=trained.examples,
        steps=trained.steps,
        bytes_up=trained.bytes_up,
        seconds=time.monotonic() - start,
    )


def _train(cell: Cell, study: StudyConfig, trained_on: PublishedSet, folder: Path) -> _Trained:
    trainer = open_trainer(study.backbone, study.sigma, study.classes, study.prompts)
    match cell.setting:
        case None:
            return _Trained(shift=_zeros(trainer))
        case setting if setting.way == "central":
            return _in_one_place(trainer, study, _central(cell, study, trained_on, trainer))
        case setting if setting.pooled:
            images = load_sites(study, side=trainer.image_side)
            together = [example for one in images.values() for example in one.train]
            return _in_one_place(trainer, study, together, sites=len(images))
    return _among_sites(trainer, study, folder)


def _zeros(trainer: Trainer) -> Vector:
    return np.zeros(trainer.layout.size, np.float32)


def _central(cell: Cell, study: StudyConfig, chosen: PublishedSet, trainer: Trainer) -> list[Example]:
    half = "base" if cell.protocol == "base_to_novel" else None
    source, records = chosen.records("train", half)
    drawn = few_shot(records, shots=study.shots, classes=study.classes, seed=study.seed)
    return load_examples(source, drawn, study.classes, side=trainer.image_side)


def _in_one_place(
    trainer: Trainer, study: StudyConfig, examples: list[Example], *, sites: int = 1
) -> _Trained:
    """Train on images in one place, for as many steps as `sites` sites make together."""
    if not examples:
        raise NoImages(f"study '{study.name}' has no training image of its classes")
    learned = train_pooled(trainer, study, examples, sites=sites)
    return _Trained(shift=learned.shift, sites=1, examples=len(examples), steps=learned.steps)


def _among_sites(trainer: Trainer, study: StudyConfig, path: Path) -> _Trained:
    """Run the study's rounds in this process, with the real apps of both sides."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    os.environ["FEDSIGMA_AUDIT"] = str(path / "audit")
    count = len(simulated_sites(study.data, study.classes, study.seed)[1])
    run_dir = RunDir.open(path) if (path / "study.yaml").exists() else RunDir.create(path, study.to_yaml())
    partition = trainer.partition(None)
    with run_dir.lock():
        messenger = Messenger(InProcessGrid(importlib.import_module(CLIENT_APP).app, count))
        federation = Federation(study, run_dir, messenger, partition, trainer.fingerprint)
        shift, done = checkpoint.load(federation)
        shift = train(federation, shift, done=done)
    rows = [row for row in run_dir.rounds() if row["status"] == "accepted"]
    examples = {
        row["site"]: row["examples"] or 0 for row in rows
    }  # with masks a site does not report its number
    return _Trained(
        shift=partition.combine(shift),
        sites=len(examples),
        examples=sum(examples.values()),
        steps=math.ceil(total_steps(study, count) / count),
        bytes_up=round(sum(row["bytes_up"] for row in rows) / max(1, len(rows))),
    )


def _evaluate(shift: Vector, cell: Cell, study: StudyConfig, chosen: PublishedSet) -> list[Score]:
    """Evaluate a model on one set: on all its classes, or on those of each half."""
    scores = []
    for half in ("base", "novel") if cell.protocol == "base_to_novel" else (None,):
        trainer = open_trainer(study.backbone, study.sigma, chosen.half(half), chosen.prompts(half))
        source, records = chosen.records("test", half)
        examples: Any = LazyExamples(source, records, chosen.half(half), side=trainer.image_side)
        try:
            output = trainer.evaluate(shift, examples)
        finally:
            examples.close()
        scores.append(
            Score(judged_on=chosen.name, half=half or "", images=len(examples), scores=output.metrics)
        )
    return scores
