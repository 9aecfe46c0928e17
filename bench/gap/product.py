"""The bundled recipe for unlike sites, as the product runs it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import Context, RecordDict

from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.in_process import InProcessGrid

__all__ = ["by_product", "product_recipe", "with_recipe"]


def product_recipe() -> StudyConfig:
    """The bundled study whose recipe is taken."""
    return load_study("white-cells-unlike-sites")


def with_recipe(study: StudyConfig, *, steps: int, sites: int) -> StudyConfig:
    """The study with the bundled recipe's training and rounds, for so many steps of a site on average."""
    recipe = product_recipe()
    training = replace(recipe.training, augment=study.training.augment)
    federation = replace(
        recipe.federation, rounds=steps * sites, participation=1 / sites, evaluate_every=steps
    )
    return replace(study, training=training, federation=federation, baselines=())


def by_product(study: StudyConfig, *, steps: int, sites: int) -> dict[str, Any]:
    """Run the real apps of both sides in this process; the accuracy of the model, by images and classes."""
    from fedsigma.client.app import app as client
    from fedsigma.server.app import app as server

    logging.getLogger("flwr").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["FEDSIGMA_AUDIT"] = str(place / "audit")
        (place / "study.yaml").write_text(with_recipe(study, steps=steps, sites=sites).to_yaml())
        config: dict[str, Any] = {"study": str(place / "study.yaml"), "out": str(place / "run")}
        config |= {"resume": False, "rounds": 0, "seed": -1}
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        server(InProcessGrid(client, sites), context)
        summary = RunDir.open(place / "run").read_summary()["federated"]
    balanced = summary["confusion"]["metrics"]["balanced_accuracy"]
    return {"accuracy": round(summary["accuracy"], 5), "balanced": round(balanced, 5)}
