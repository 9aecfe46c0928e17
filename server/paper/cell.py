"""Running one cell: training in one place or among sites, and judging on the test images."""

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
from fedsigma.server.federation.aggregation import Aggregator
from fedsigma.server.federation.messenger import Messenger
from fedsigma.server.federation.rounds import Federation, train
from fedsigma.server.federation.site_manager import SiteManager
from fedsigma.server.federation.site_sampling import total_steps
from fedsigma.server.paper.lazy_images import LazyExamples
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.in_process import InProcessGrid

__all__ = ["Finished", "Score", "run_cell"]

Vector = NDArray[np.float32]
CLIENT_APP = "fedsigma.clientapp"
"""The sites' app, named as Flower is told it: the server imports nothing of the sites'."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a model did. half: 'base' or 'novel', '' for all classes; scores by name, shares of 1."""

    judged_on: str
    half: str
    images: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a cell gave.

    Fields: scores; sites that trained (1 for one place, 0 for no training); examples in all; steps of one
    site; bytes_up, one site's in one round; seconds.
    """

    scores: tuple[Score, ...]
    sites: int
    examples: int
    steps: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A model and how it came about: as in `Finished`."""

    shift: Vector
    sites: int = 0
    examples: int = 0
    steps: int = 0
    bytes_up: int = 0

    def save(self, file: Path) -> None:
        """Write it, the numbers beside the shift."""
        numbers = {name: str(value) for name, value in vars(self).items() if name != "shift"}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, to_bytes({"shift": self.shift}, metadata=numbers))

    @classmethod
    def load(cls, file: Path) -> _Trained:
        """Read what `save` wrote."""
        with safe_open(file, framework="np") as found:
            numbers = {name: int(value) for name, value in found.metadata().items()}
            return cls(shift=found.get_tensor("shift"), **numbers)


def run_cell(
    cell: Cell, study: StudyConfig, sets: Mapping[str, PublishedSet], folder: Path, judge_on: Sequence[str]
) -> Finished:
    """Train a cell's model, if it has one and has not been trained before, and judge it.

    Args:
        cell, study: What to train; the study is `study_of` the cell.
        sets: By name, with those that the cell is trained and judged on.
        folder: Of this cell; the run folder of a federated one, which is gone on with if it was interrupted.
            A model that is judged on several sets is kept beside it, for those that come later.
        judge_on: Those of the cell's sets.

    Raises:
        DataError: Images cannot be read, or not divided as the setting says.
        TrainingError: Training diverged.
    """
    begun = time.monotonic()
    kept = folder.with_name(f"{folder.name}.safetensors")
    if kept.is_file():
        trained = _Trained.load(kept)
    else:
        trained = _train(cell, study, sets[cell.trained_on], folder)
        if len(cell.judged_on) > 1:
            trained.save(kept)
    scores = tuple(score for name in judge_on for score in _judge(trained.shift, cell, study, sets[name]))
    return Finished(
        scores=scores,
        sites=trained.sites,
        examples=trained.examples,
        steps=trained.steps,
        bytes_up=trained.bytes_up,
        seconds=time.monotonic() - begun,
    )


def _train(cell: Cell, study: StudyConfig, trained_on: PublishedSet, folder: Path) -> _Trained:
    learner = open_trainer(study.backbone, study.sigma, study.classes, study.prompts)
    match cell.setting:
        case None:
            return _Trained(shift=_zeros(learner))
        case setting if setting.way == "central":
            return _in_one_place(learner, study, _central(cell, study, trained_on, learner))
        case setting if setting.pooled:
            images = load_sites(study, side=learner.image_side)
            together = [example for one in images.values() for example in one.train]
            return _in_one_place(learner, study, together, sites=len(images))
    return _among_sites(learner, study, folder)


def _zeros(learner: Trainer) -> Vector:
    return np.zeros(learner.layout.size, np.float32)


def _central(cell: Cell, study: StudyConfig, chosen: PublishedSet, learner: Trainer) -> list[Example]:
    half = "base" if cell.protocol == "base_to_novel" else None
    source, records = chosen.records("train", half)
    drawn = few_shot(records, shots=study.shots, classes=study.classes, seed=study.seed)
    return load_examples(source, drawn, study.classes, side=learner.image_side)


def _in_one_place(
    learner: Trainer, study: StudyConfig, examples: list[Example], *, sites: int = 1
) -> _Trained:
    """Train on these images, for the steps of so many sites together."""
    if not examples:
        raise NoImages(f"study '{study.name}' has no training image of its classes")
    learned = train_pooled(learner, study, examples, sites=sites)
    return _Trained(shift=learned.shift, sites=1, examples=len(examples), steps=learned.steps)


def _among_sites(learner: Trainer, study: StudyConfig, path: Path) -> _Trained:
    """Run the study's rounds with the real apps of both sides, in this process."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    os.environ["FEDSIGMA_AUDIT"] = str(path / "audit")
    count = len(simulated_sites(study.data, study.classes, study.seed)[1])
    folder = RunDir.open(path) if (path / "study.yaml").exists() else RunDir.create(path, study.to_yaml())
    aggregator, split = Aggregator(study), learner.partition(None)
    with folder.lock():
        shift, done = checkpoint.load(
            folder, aggregator, study=study, split=split, fingerprint=learner.fingerprint
        )
        exchange = Messenger(InProcessGrid(importlib.import_module(CLIENT_APP).app, count))
        roster = SiteManager(exchange, folder, study, learner.fingerprint)
        federation = Federation(
            study=study,
            site_manager=roster,
            messenger=exchange,
            run_dir=folder,
            aggregator=aggregator,
            partition=split,
            fingerprint=learner.fingerprint,
        )
        shift = train(federation, shift, done=done)
    rows = [row for row in folder.rounds() if row["status"] == "accepted"]
    examples = {row["site"]: row["examples"] or 0 for row in rows}  # under masks a site does not tell
    return _Trained(
        shift=split.combine(shift),
        sites=len(examples),
        examples=sum(examples.values()),
        steps=math.ceil(total_steps(study, count) / count),
        bytes_up=round(sum(row["bytes_up"] for row in rows) / max(1, len(rows))),
    )


def _judge(shift: Vector, cell: Cell, study: StudyConfig, chosen: PublishedSet) -> list[Score]:
    """Judge a model on one set: on all its classes, or among those of each half."""
    found = []
    for half in ("base", "novel") if cell.protocol == "base_to_novel" else (None,):
        learner = open_trainer(study.backbone, study.sigma, chosen.half(half), chosen.prompts(half))
        source, records = chosen.records("test", half)
        examples: Any = LazyExamples(source, records, chosen.half(half), side=learner.image_side)
        try:
            judged = learner.evaluate(shift, examples)
        finally:
            examples.close()
        found.append(
            Score(judged_on=chosen.name, half=half or "", images=len(examples), scores=judged.metrics)
        )
    return found
