"""Run one cell: train in one place or at sites, and evaluate on the test images."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.loading import load_examples
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
from fedsigma.server.paper.lazy_images import lazy_examples
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.in_process import InProcessGrid

__all__ = ["Score", "TrainingCost", "run_cell"]

Vector = NDArray[np.float32]
CLIENT_APP = "fedsigma.clientapp"
"""Module of the sites' app, loaded by name, since the server does not import the sites' code."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Metrics of a model on one set.

    Attributes:
        evaluated_on: Name of the set.
        half: `base` or `novel`; empty for all classes.
        images: Number of test images.
        scores: Metrics by name, 0 to 1.
    """

    evaluated_on: str
    half: str
    images: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Cost of training a model; all 0 for the model without training.

    Attributes:
        sites: Sites that trained; 1 for one place.
        examples: Training images of all sites.
        steps: Optimiser steps of one site.
        bytes_up: Bytes that one site uploads in one round.
    """

    sites: int = 0
    examples: int = 0
    steps: int = 0
    bytes_up: int = 0


def run_cell(
    cell: Cell, study: StudyConfig, sets: Mapping[str, PublishedSet], folder: Path, evaluate_on: Sequence[str]
) -> tuple[list[Score], TrainingCost]:
    """Train a cell's model, unless it was trained before or needs no training, and evaluate it.

    Args:
        cell: The cell.
        study: Its study, from `build_study`.
        sets: Sets by name, including those that the cell is trained and evaluated on.
        folder: Run folder of a federated cell, resumed if it was interrupted. A model that is evaluated on
            several sets is stored beside it.
        evaluate_on: Names of the cell's sets to evaluate on.

    Raises:
        DataError: Images cannot be read, or cannot be divided as in the setting.
        TrainingError: Training diverged.
    """
    model_file = folder.with_name(f"{folder.name}.safetensors")
    if model_file.is_file():
        shift, cost = _load_model(model_file)
    else:
        shift, cost = _train(cell, study, sets[cell.trained_on], folder)
        if len(cell.evaluated_on) > 1:
            metadata = {name: str(value) for name, value in asdict(cost).items()}
            write_atomic(model_file, save({"shift": shift}, metadata=metadata))
    scores = [score for name in evaluate_on for score in _evaluate(shift, cell, study, sets[name])]
    return scores, cost


def _load_model(file: Path) -> tuple[Vector, TrainingCost]:
    with safe_open(file, framework="np") as tensors:
        numbers = {name: int(value) for name, value in tensors.metadata().items()}
        return tensors.get_tensor("shift"), TrainingCost(**numbers)


def _train(
    cell: Cell, study: StudyConfig, trained_on: PublishedSet, folder: Path
) -> tuple[Vector, TrainingCost]:
    trainer = open_trainer(study.backbone, study.sigma, study.classes, study.prompts)
    setting, sites = cell.setting, 1
    if setting is None:
        return np.zeros(trainer.layout.size, np.float32), TrainingCost()
    if setting.division == "central":
        source, records = trained_on.records("train", cell.training_half)
        records = few_shot(records, shots=study.shots, classes=study.classes, seed=study.seed)
        examples = load_examples(source, records, study.classes, side=trainer.image_side)
    elif setting.pooled:
        site_data = load_sites(study, side=trainer.image_side)
        examples, sites = [example for data in site_data.values() for example in data.train], len(site_data)
    else:
        return _train_at_sites(trainer, study, folder)
    if not examples:
        raise NoImages(f"study '{study.name}' has no training image of its classes")
    output = train_pooled(trainer, study, examples, sites=sites)
    return output.shift, TrainingCost(sites=1, examples=len(examples), steps=output.steps)


def _train_at_sites(trainer: Trainer, study: StudyConfig, path: Path) -> tuple[Vector, TrainingCost]:
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
    # With secure aggregation, sites do not report their number of images.
    examples = {row["site"]: row["examples"] or 0 for row in rows}
    return partition.combine(shift), TrainingCost(
        sites=len(examples),
        examples=sum(examples.values()),
        steps=math.ceil(total_steps(study, count) / count),
        bytes_up=round(sum(row["bytes_up"] for row in rows) / max(1, len(rows))),
    )


def _evaluate(shift: Vector, cell: Cell, study: StudyConfig, published: PublishedSet) -> Iterator[Score]:
    """Evaluate a model on one set: on all its classes, or on those of each half."""
    for half in ("base", "novel") if cell.training_half else (None,):
        classes = published.half(half)
        trainer = open_trainer(study.backbone, study.sigma, classes, published.prompts(half))
        source, records = published.records("test", half)
        with lazy_examples(source, records, classes, side=trainer.image_side) as examples:
            metrics = trainer.evaluate(shift, examples).metrics
        yield Score(evaluated_on=published.name, half=half or "", images=len(records), scores=metrics)
