"""Try recipes on validation images taken from the training part; the test part is never read.

    python -m bench.tune --data DIR --study white-cells-four-labs --try learning_rate=0.01,augment=microscopy

Each --try is one recipe: fields of the training section, `rounds`, and `server_learning_rate` and
`server_momentum` as FedAvgM has them. The rest of a site's training images (those the few-shot draw left
over) serve as validation. Everything runs in this process, without Flower.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedsigma.common.backbones import build_model, load_backbone
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

Sites = dict[str, tuple[list[Example], list[Example]]]


def validation_sites(
    study: StudyConfig,
    side: int,
    most: int,
    divided: tuple[Source, Mapping[str, list[Record]]] | None = None,
) -> Sites:
    """Few-shot training and validation images of each site, both from its training part.

    Args:
        study: its few-shot draw, and its sites.
        side: of the images, in pixels.
        most: validation images a class and site.
        divided: a source and its records by site, in place of the study's sites.
    """
    source, parts = divided or simulated_sites(study.data, study.classes, study.seed)
    sites: Sites = {}
    for name, found in parts.items():
        records = [r for r in found if r.split == "train"]
        chosen = few_shot(records, shots=study.shots, classes=study.classes, seed=study.seed)
        groups = {r.group for r in chosen if r.group is not None}
        taken = {r.key for r in chosen}
        rest = [r for r in records if r.key not in taken and (r.group is None or r.group not in groups)]
        held: list[Record] = few_shot(rest, shots=most, classes=study.classes, seed=study.seed + 1)
        sites[name] = tuple(load_examples(source, part, study.classes, side=side) for part in (chosen, held))
    return sites


def judge(task: ClipClassifier, shift: Tensor, sites: Sites) -> dict[str, Predictions]:
    """Predictions of a shift on every site's validation images."""
    task.sigma.set_shift(shift)
    return {name: evaluate(task, held) for name, (_, held) in sites.items() if held}


def accuracy(found: dict[str, Predictions]) -> float:
    """Pooled accuracy."""
    return compute_metrics(Predictions.concatenate(list(found.values()))).accuracy or 0.0


@dataclass
class Server:
    """FedAvgM's step between rounds (Hsu et al. 2019, arXiv:1909.06335); plain FedAvg by default."""

    learning_rate: float = 1.0
    momentum: float = 0.0
    _velocity: Tensor | float = 0.0

    def step(self, shift: Tensor, mean: Tensor) -> Tensor:
        """The next shift, from the one sent out and the mean of those that came back."""
        self._velocity = self.momentum * self._velocity + (shift - mean)
        return shift - self.learning_rate * self._velocity


def compare(
    task: ClipClassifier, sites: Sites, study: StudyConfig, methods: set[str], server: Server
) -> dict[str, float]:
    """Accuracy of the methods under the study's recipe."""
    recipe, steps, rounds = study.training, study.training.local_steps, study.federation.rounds
    zero, total, result = torch.zeros(task.sigma.layout.size), steps * rounds, {}

    def trained(name: str, shift: Tensor, examples: list[Example], first: int, count: int, of: int) -> Tensor:
        task.sigma.set_shift(shift)
        train(
            task,
            examples,
            recipe,
            first_step=first,
            steps=count,
            total_steps=of,
            seed=derive_seed(study.seed, name),
        )
        return task.sigma.get_shift()

    if "zero" in methods:
        result["zero"] = accuracy(judge(task, zero, sites))
    if "federated" in methods:
        shift = zero
        for number in range(rounds):
            parts = [trained(n, shift, x, number * steps, steps, total) for n, (x, _) in sites.items()]
            weights = torch.tensor([float(len(x)) for x, _ in sites.values()])
            mean = (torch.stack(parts) * (weights / weights.sum())[:, None]).sum(0)
            shift = server.step(shift, mean)
        result["federated"] = accuracy(judge(task, shift, sites))
        result["norm"] = float(shift.norm())
    if "local" in methods:
        judged = {n: judge(task, trained(n, zero, x, 0, total, total), sites) for n, (x, _) in sites.items()}
        result["home"] = accuracy({n: found[n] for n, found in judged.items() if n in found})
        result["everywhere"] = sum(map(accuracy, judged.values())) / len(judged)
    if "pooled" in methods:
        everything = [e for x, _ in sites.values() for e in x]
        of = total * len(sites)
        result["pooled"] = accuracy(judge(task, trained("pooled", zero, everything, 0, of, of), sites))
    return result


def parse(text: str) -> dict[str, object]:
    """`a=1,b=x` as a dictionary with numbers where they are numbers."""
    found: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def main() -> None:
    """Run every recipe and print a line for each."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path)
    p.add_argument("--study", required=True)
    p.add_argument("--backbone", help="other than the study's")
    p.add_argument("--random-weights", action="store_true", help="the same architecture, untrained")
    p.add_argument("--try", dest="tries", action="append", default=[])
    p.add_argument("--methods", nargs="+", default=["zero", "federated", "local", "pooled"])
    p.add_argument("--validation", type=int, default=25, help="validation images a class and site at most")
    p.add_argument("--seeds", type=int, nargs="+", default=[11])
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if a.data:
        os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    base, lines = load_study(a.study), []
    backbone = load_backbone(a.backbone or base.backbone)
    if a.random_weights:
        torch.manual_seed(0)
        model = build_model(backbone.model_cfg).eval().requires_grad_(False)
        backbone = replace(backbone, model=model)
    sigma = SigmaModel.adapt(backbone.model, base.sigma)
    task = ClipClassifier(backbone, sigma, base.prompts)
    for text in a.tries or [""]:
        wanted, started, found = parse(text), time.time(), []
        rounds = wanted.pop("rounds", base.federation.rounds)
        server = (wanted.pop("server_learning_rate", 1.0), wanted.pop("server_momentum", 0.0))
        for seed in a.seeds:
            study = replace(
                base,
                seed=seed,
                training=replace(base.training, **wanted),
                federation=replace(base.federation, rounds=rounds),
            )
            sites = validation_sites(study, backbone.image_size * 3 // 2, a.validation)
            found.append(compare(task, sites, study, set(a.methods), Server(*server)))
        mean = {key: round(sum(f[key] for f in found) / len(found), 4) for key in found[0]}
        lines.append({"recipe": text or "as the study says", **mean, "seconds": round(time.time() - started)})
        print(lines[-1], flush=True)
    if a.json:
        a.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
