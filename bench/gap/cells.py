"""The cells of the comparison: one run each, made once and kept in a text file."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.cell_store import CellStore, recipe_digest
from bench.gap.candidate import Candidate
from bench.gap.rounds import federate, train_pooled
from bench.runs import run_in_process
from bench.tune import Sites, validation_sites
from fedsigma.client.app import app as client
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.data.partition import partition
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.sources.site_data import load_sites
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.loop import evaluate
from fedsigma.server.simulation.in_process import InProcessGrid

VALIDATION = 80
"""Validation images of a class and site at most."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        part: Images to evaluate on: `validation` (left over by the few-shot draw) or `test`.
        study: Name of the study.
        sites: Number of sites; 0 for the study's own sites.
        alpha: Of the Dirichlet distribution that divides the images; 0 for the study's own sites.
        method: `pooled`, `product` or `candidate`.
        setting: Settings of the method.
        steps: Steps of a site.
        seed: Seed of the study.
    """

    part: str
    study: str
    sites: int
    alpha: float
    method: str
    setting: dict[str, Any]
    steps: int
    seed: int

    @property
    def key(self) -> str:
        """See `Keyed`; default settings are left out, so that cells stay valid when a setting is added."""
        default = asdict(Candidate()) if self.method == "candidate" else {}
        setting = {k: v for k, v in self.setting.items() if k not in default or default[k] != v}
        return json.dumps({**vars(self), "setting": setting}, sort_keys=True)


class Runner:
    """Runs cells, each once.

    Args:
        store: Where cells are kept.
        sites: Number of sites.
        alpha: See `Cell`.
        steps: Steps of a site.
        run_missing: False: missing cells are None.
    """

    def __init__(self, store: CellStore, *, sites: int, alpha: float, steps: int, run_missing: bool) -> None:
        self.store, self.sites, self.alpha, self.steps = store, sites, alpha, steps
        self.run_missing = run_missing
        self._images: tuple[str, Sites] = ("", {})

    def study(self, name: str, seed: int) -> StudyConfig:
        """Return a study, with its images divided among the sites unless alpha is 0."""
        base = load_study(name)
        assert base.data is not None
        rounds = self.steps // base.training.local_steps
        base = replace(base, seed=seed, federation=replace(base.federation, rounds=rounds))
        if not self.alpha:
            return base
        sites_by = {"dirichlet": {"alpha": self.alpha, "sites": self.sites}}
        return replace(base, data=replace(base.data, sites_by=sites_by))

    def figures(self, part: str, name: str, method: str, setting: dict[str, Any], seed: int) -> Any:
        """Return the figures of a cell, from the store or by running it."""
        if method == "product" and part != "test":
            raise SystemExit("product is evaluated on the test part only: name it with --test")
        sites = self.sites if self.alpha else 0
        cell = Cell(part, name, sites, self.alpha, method, setting, self.steps, seed)
        study = self.study(name, seed)
        recipe = recipe_digest(study, *([product_recipe()] if method == "product" else []))
        figures = self.store.find(cell, recipe)
        if figures is None and self.run_missing:
            started, used = time.monotonic(), time.process_time()
            figures = self._run(cell, study)
            figures["seconds"] = round(time.monotonic() - started)
            figures["cpu_seconds"] = round(time.process_time() - used)
            self.store.save(cell, figures, recipe)
            print(f"{time.strftime('%H:%M')} {cell.key}: {figures}", flush=True)
        return figures

    def _run(self, cell: Cell, study: StudyConfig) -> dict[str, Any]:
        if cell.method == "product":
            return run_product(study, steps=self.steps, sites=self.sites)
        task, sites = task_of(cell.study), self.images(study, cell.part)
        train = {name: examples for name, (examples, _) in sites.items() if examples}
        if cell.method == "pooled":
            pool = [e for examples in train.values() for e in examples]
            shift = train_pooled(task, study, pool, cell.setting["learning_rate"], len(sites))
        else:
            shift = federate(task, study, train, Candidate(**cell.setting))
        return evaluate_shift(task, shift, [e for _, examples in sites.values() for e in examples])

    def images(self, study: StudyConfig, part: str) -> Sites:
        """Return each site's images for training and evaluation; those of the last call are kept."""
        key, side = f"{part} {study.to_yaml()}", task_of(study.name).image_size * 3 // 2
        if self._images[0] != key:
            self._images = ("", {})
            if part == "test":
                data = load_sites(study, side=side)
                sites: Sites = {name: (site.train, site.test) for name, site in data.items()}
            else:
                sites = validation_sites(study, side, VALIDATION, _divide_training_part(study))
            self._images = (key, sites)
        return self._images[1]


def _divide_training_part(study: StudyConfig) -> Any:
    """Return the source and the sites' training records: another division than that of the test part."""
    assert study.data is not None
    source = open_source(study.data.source, **study.data.options)
    records = [r for r in source.records if r.split == "train" and r.label in study.classes]
    return source, partition(records, study.data.sites_by, study.seed)


@lru_cache(maxsize=1)
def task_of(name: str) -> ClipClassifier:
    """Return a study's adapted backbone with its prompts."""
    study = load_study(name)
    backbone = load_backbone(study.backbone)
    return ClipClassifier(backbone, SigmaModel.adapt(backbone.model, SigmaConfig()), study.prompts)


def evaluate_shift(task: ClipClassifier, shift: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
    """Return accuracy over all images, its mean over classes, and the cross-entropy."""
    task.sigma.set_shift(shift)
    predictions = evaluate(task, examples)
    labels, probabilities = predictions.labels, predictions.probabilities
    correct = (probabilities.argmax(1) == labels).double()
    by_class = [correct[labels == c].mean().item() for c in labels.unique()]
    loss = torch.nn.functional.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item()
    return {
        "accuracy": round(correct.mean().item(), 5),
        "balanced_accuracy": round(mean(by_class), 5),
        "loss": round(loss, 4),
    }


def product_recipe() -> StudyConfig:
    """Return the bundled study whose recipe is used."""
    return load_study("white-cells-unlike-sites")


def run_product(study: StudyConfig, *, steps: int, sites: int) -> dict[str, Any]:
    """Run both real apps with the bundled recipe, for so many steps of a site on average.

    Returns:
        Accuracy of the model over all images, and its mean over classes.
    """
    recipe = product_recipe()
    training = replace(recipe.training, augment=study.training.augment)
    rounds, share = steps * sites, 1 / sites
    federation = replace(recipe.federation, rounds=rounds, participation=share, evaluate_every=steps)
    study = replace(study, training=training, federation=federation, baselines=())
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        run = run_in_process(study, Path(folder) / "run", InProcessGrid(client, sites))
        summary = run.read_summary()["federated"]
    balanced = summary["confusion"]["metrics"]["balanced_accuracy"]
    return {"accuracy": round(summary["accuracy"], 5), "balanced_accuracy": round(balanced, 5)}
