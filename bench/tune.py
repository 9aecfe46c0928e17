"""Try recipes on validation images taken from the training part; the test part is not used.

    python -m bench.tune --data DIR --study white-cells-four-labs --try learning_rate=0.01,augment=microscopy

Each --try is one recipe: fields of the training section, `rounds`, and `server_learning_rate` and
`server_momentum` as in FedAvgM. Training images of a site that the few-shot draw left over serve as
validation images. Everything runs in this process, without Flower.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.harness import Table, argument_parser, parse_arguments, write_json
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.data.loading import Example, load_examples
from fedsigma.common.data.records import Record, Source
from fedsigma.common.data.sampling import few_shot
from fedsigma.common.data.sources.site_data import simulated_sites
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.loop import evaluate, train
from fedsigma.common.training.metrics import Predictions, compute_metrics
from fedsigma.common.training.trainer import derive_seed

Sites = Mapping[str, tuple[list[Example], list[Example]]]
"""Training images and images to evaluate on, by site."""
METHODS = ("zero", "federated", "local", "pooled")
FIGURES = ("zero", "federated", "norm", "home", "everywhere", "pooled")


def validation_sites(
    study: StudyConfig,
    side: int,
    limit: int,
    divided: tuple[Source, Mapping[str, list[Record]]] | None = None,
) -> Sites:
    """Return few-shot training and validation images of each site, both from its training part.

    Args:
        study: Its few-shot draw, and its sites.
        side: Side of the images in pixels.
        limit: Validation images of a class and site at most.
        divided: A source and its records by site, in place of the study's sites.
    """
    source, parts = divided or simulated_sites(study.data, study.classes, study.seed)
    sites = {}
    for name, records in parts.items():
        records = [r for r in records if r.split == "train"]
        chosen = few_shot(records, shots=study.shots, classes=study.classes, seed=study.seed)
        groups = {r.group for r in chosen if r.group is not None}
        keys = {r.key for r in chosen}
        rest = [r for r in records if r.key not in keys and (r.group is None or r.group not in groups)]
        held_out = few_shot(rest, shots=limit, classes=study.classes, seed=study.seed + 1)
        sites[name] = (
            load_examples(source, chosen, study.classes, side=side),
            load_examples(source, held_out, study.classes, side=side),
        )
    return sites


def evaluate_shift(task: ClipClassifier, shift: Tensor, sites: Sites) -> dict[str, Predictions]:
    """Return the predictions of a shift on every site's validation images."""
    task.sigma.set_shift(shift)
    return {name: evaluate(task, held_out) for name, (_, held_out) in sites.items() if held_out}


def accuracy(predictions: Mapping[str, Predictions]) -> float:
    """Return the accuracy over all sites' images."""
    return compute_metrics(Predictions.concatenate(list(predictions.values()))).accuracy or 0.0


@dataclass
class FedAvgM:
    """FedAvgM's step between rounds (Hsu et al. 2019, arXiv:1909.06335); plain FedAvg by default."""

    learning_rate: float = 1.0
    momentum: float = 0.0
    _velocity: Tensor | float = 0.0

    def step(self, shift: Tensor, mean: Tensor) -> Tensor:
        """Return the next shift, from the last one and the mean of the sites'."""
        self._velocity = self.momentum * self._velocity + (shift - mean)
        return shift - self.learning_rate * self._velocity


def compare(
    task: ClipClassifier, sites: Sites, study: StudyConfig, methods: set[str], server: FedAvgM
) -> dict[str, float]:
    """Return the accuracy of the methods under the study's recipe."""
    steps, rounds = study.training.local_steps, study.federation.rounds
    zero, total, figures = torch.zeros(task.sigma.layout.size), steps * rounds, {}

    def trained(name: str, shift: Tensor, examples: list[Example], first: int, count: int, of: int) -> Tensor:
        task.sigma.set_shift(shift)
        seed = derive_seed(study.seed, name)
        train(task, examples, study.training, first_step=first, steps=count, total_steps=of, seed=seed)
        return task.sigma.get_shift()

    if "zero" in methods:
        figures["zero"] = accuracy(evaluate_shift(task, zero, sites))
    if "federated" in methods:
        shift = zero
        for number in range(rounds):
            shifts = [trained(n, shift, x, number * steps, steps, total) for n, (x, _) in sites.items()]
            weights = torch.tensor([float(len(x)) for x, _ in sites.values()])
            mean = (torch.stack(shifts) * (weights / weights.sum())[:, None]).sum(0)
            shift = server.step(shift, mean)
        figures["federated"] = accuracy(evaluate_shift(task, shift, sites))
        figures["norm"] = float(shift.norm())
    if "local" in methods:
        by_model = {
            name: evaluate_shift(task, trained(name, zero, examples, 0, total, total), sites)
            for name, (examples, _) in sites.items()
        }
        at_home = {name: by_site[name] for name, by_site in by_model.items() if name in by_site}
        figures["home"] = accuracy(at_home)
        figures["everywhere"] = sum(map(accuracy, by_model.values())) / len(by_model)
    if "pooled" in methods:
        pool, count = [e for examples, _ in sites.values() for e in examples], total * len(sites)
        shift = trained("pooled", zero, pool, 0, count, count)
        figures["pooled"] = accuracy(evaluate_shift(task, shift, sites))
    return figures


def parse_recipe(text: str) -> dict[str, Any]:
    """Parse `a=1,b=x`; values are JSON, or text."""
    recipe: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            recipe[key] = json.loads(value)
        except json.JSONDecodeError:
            recipe[key] = value
    return recipe


def main() -> None:
    """Run every recipe and print a row for each."""
    p = argument_parser(__doc__, data="folder of the study's images", seeds=(11,))
    p.add_argument("--study", required=True)
    p.add_argument(
        "--try", dest="recipes", action="append", metavar="RECIPE", help="such as rounds=5,augment=none"
    )
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    p.add_argument("--validation", type=int, default=25, help="validation images of a class and site at most")
    options = parse_arguments(p)
    base, rows = load_study(options.study), []
    backbone = load_backbone(base.backbone)
    task = ClipClassifier(backbone, SigmaModel.adapt(backbone.model, base.sigma), base.prompts)
    table = Table({**dict.fromkeys(FIGURES, ">10.4f"), "seconds": ">8.0f", "recipe": "<"})
    for text in options.recipes or [""]:
        recipe, started, runs = parse_recipe(text), time.time(), []
        rounds = recipe.pop("rounds", base.federation.rounds)
        server = (recipe.pop("server_learning_rate", 1.0), recipe.pop("server_momentum", 0.0))
        for seed in options.seeds:
            training, federation = replace(base.training, **recipe), replace(base.federation, rounds=rounds)
            study = replace(base, seed=seed, training=training, federation=federation)
            sites = validation_sites(study, backbone.image_size * 3 // 2, options.validation)
            runs.append(compare(task, sites, study, set(options.methods), FedAvgM(*server)))
        mean = {key: round(sum(run[key] for run in runs) / len(runs), 4) for key in runs[0]}
        row = {"recipe": text or "the study's", **mean, "seconds": round(time.time() - started)}
        table.row(*(row.get(name) for name in (*FIGURES, "seconds", "recipe")))
        rows.append(row)
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
