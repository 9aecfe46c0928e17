"""The bundled recipe for sites that differ, as the product runs it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.runs import run_in_process
from fedsigma.client.app import app as client
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.server.simulation.in_process import InProcessGrid

__all__ = ["product_recipe", "run_product"]


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
