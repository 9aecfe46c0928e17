"""What non-identical sites cost against pooled training, and what of a list of candidates wins it back.

    python -m bench.gap --data DIR --out out/gap --json out/gap.json

Run it from the project's folder. DIR holds `wbc_labs.parquet` and `ham10000_sites.parquet`. Both studies of
real images, divided anew among --sites sites by a Dirichlet distribution. All ways make 120 steps a site in
batches of 16; pooled makes all sites' steps one after the other. --validate names candidates that are judged
on images of the training part that the few-shot draw left over, --test those judged on the test
part, among them `product`, the bundled recipe by the real apps. Each run is kept in --out/cells.sqlite: a
call that was cut off can be made again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from bench.gap.catalogue import POOLED_RATES, WAYS
from bench.gap.product import by_product, product_recipe
from bench.gap.rounds import federate, pooled
from bench.gap.ways import Way
from bench.methods.cells import Cells, recipe_of
from bench.methods.federation import study_sites
from bench.tune import validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.schema import did_you_mean
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.common.data.partition import partition
from fedsigma.common.data.records import Record, Source
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import Predictions

STUDIES = ("white-cells-four-labs", "dermoscopy-four-sites")
TAILS = (0.25,)
Sites = Mapping[str, tuple[list[Example], list[Example]]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. method: `zero-shot`, `pooled`, `local`, `product` or `way`, with its setting."""

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
        """The same for the same cell; defaults are left out, so that a new setting does no harm."""
        default = asdict(Way()) if self.method == "way" else {}
        setting = {k: v for k, v in self.setting.items() if k not in default or default[k] != v}
        return json.dumps({**vars(self), "setting": setting}, sort_keys=True)


class Bench:
    """Runs cells, each once."""

    def __init__(self, cells: Cells, *, sites: int, alpha: float, steps: int, run_missing: bool) -> None:
        self.cells, self.count, self.alpha, self.steps = cells, sites, alpha, steps
        self.run_missing = run_missing

    def study(self, name: str, seed: int) -> StudyConfig:
        """The study, divided anew where alpha is above zero."""
        base = load_study(name)
        if base.data is None:
            raise SystemExit(f"{name} has no section data")
        rounds = self.steps // base.training.local_steps
        base = replace(base, seed=seed, federation=replace(base.federation, rounds=rounds))
        if not self.alpha:
            return base
        ways = {"dirichlet": {"alpha": self.alpha, "sites": self.count}}
        return replace(base, data=replace(base.data, sites_by=ways))

    def figures(self, part: str, study: str, method: str, setting: dict[str, Any], seed: int) -> Any:
        """The figures of a cell; None if it is missing and nothing is to be run."""
        if method == "product" and part != "test":
            raise SystemExit("product is judged on the test part alone: name it with --test")
        cell = Cell(
            part=part,
            study=study,
            sites=self.count if self.alpha else 0,
            alpha=self.alpha,
            method=method,
            setting=setting,
            steps=self.steps,
            seed=seed,
        )
        made = self.study(study, seed)
        recipe = recipe_of(made, *([product_recipe()] if method == "product" else []))
        found = self.cells.find(cell, recipe)
        if found is None and self.run_missing:
            started, used = time.monotonic(), time.process_time()
            found = self._run(cell, made)
            found["seconds"] = round(time.monotonic() - started)
            found["cpu_seconds"] = round(time.process_time() - used)
            self.cells.keep(cell, found, recipe)
            print(f"{time.strftime('%H:%M')} {cell.key}: {found}", flush=True)
        return found

    def _run(self, cell: Cell, study: StudyConfig) -> dict[str, Any]:
        if cell.method == "product":
            return by_product(study, steps=self.steps, sites=self.count)
        task = task_for(cell.study)
        sites = images(study, cell.part, task.image_size * 3 // 2)
        train = {name: given for name, (given, _) in sites.items() if given}
        held = [e for _, part in sites.values() for e in part]
        if cell.method == "zero-shot":
            return judge(task, torch.zeros(task.sigma.layout.size), held)
        if cell.method == "pooled":
            examples = [e for given in train.values() for e in given]
            rate = cell.setting["rate"]
            return judge(task, pooled(task, study, examples, rate, len(sites)), held)
        if cell.method == "local":
            each = [
                judge(task, pooled(task, study, x, cell.setting["rate"], 1, name), held)
                for name, x in train.items()
            ]
            return {key: mean(one[key] for one in each) for key in each[0]}
        outcome = federate(task, study, train, Way(**cell.setting), TAILS)
        found = judge(task, outcome.last, held)
        if cell.part == "validation":
            found |= {f"tail-{tail:g}": judge(task, shift, held) for tail, shift in outcome.tails.items()}
        return found


@lru_cache(maxsize=1)
def task_for(name: str) -> ClipClassifier:
    """The backbone under the adapter, with a study's prompts."""
    study = load_study(name)
    backbone = load_backbone(study.backbone)
    return ClipClassifier(backbone, SigmaModel.adapt(backbone.model, SigmaConfig()), study.prompts)


_images: dict[str, Sites] = {}


def divided(study: StudyConfig) -> tuple[Source, Mapping[str, list[Record]]]:
    """The training records alone, divided: other divisions than those that the test part is judged with."""
    if study.data is None:
        raise SystemExit(f"{study.name} has no section data")
    source = open_source(study.data.source, **study.data.options)
    kept = [r for r in source.records if r.split == "train" and r.label in study.classes]
    return source, partition(kept, study.data.sites_by, study.seed)


def images(study: StudyConfig, part: str, side: int) -> Sites:
    """Training images and those to judge by, of each site; one study's at a time are kept."""
    key = f"{part} {study.to_yaml()}"
    if key not in _images:
        _images.clear()
        if part == "validation":
            _images[key] = validation_sites(study, side, 80, divided(study))
        else:
            _images[key] = {n: (d.train, d.test) for n, d in study_sites(study, side).items()}
    return _images[key]


def judge(task: ClipClassifier, shift: Tensor, held: Sequence[Example]) -> dict[str, Any]:
    """Accuracy over all images, and its mean over the classes."""
    task.sigma.set_shift(shift)
    found: Predictions = evaluate(task, held)
    right = (found.probabilities.argmax(1) == found.labels).double()
    by_class = [right[found.labels == c].mean().item() for c in found.labels.unique()]
    loss = torch.nn.functional.nll_loss(found.probabilities.clamp_min(1e-12).log(), found.labels).item()
    return {
        "accuracy": round(right.mean().item(), 5),
        "balanced": round(mean(by_class), 5),
        "loss": round(loss, 4),
    }


def class_table(bench: Bench, study: str, seed: int, part: str) -> str:
    """Training images by site and class, and how many there are to judge by."""
    made = bench.study(study, seed)
    lines = [f"{study}, seed {seed}, {part}: training images by class; images to judge by"]
    for name, (given, held) in images(made, part, task_for(study).image_size * 3 // 2).items():
        counts = Counter(e.label for e in given)
        row = " ".join(f"{counts[c]:3d}" for c in range(len(made.classes)))
        lines.append(f"  {name:16s} {row}   {len(held)}")
    return "\n".join(lines)


def rows(validate: Sequence[str], rates: Sequence[float]) -> list[tuple[str, str, dict[str, Any]]]:
    """Title, method and setting of every row."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name in validate:
        if name in ("zero-shot", "local", "product"):
            found.append((name, name, {"rate": 0.04} if name == "local" else {}))
        elif name == "pooled":
            found += [(f"pooled, rate {rate:g}", "pooled", {"rate": rate}) for rate in rates]
        elif name in WAYS:
            found.append((name, "way", asdict(WAYS[name])))
        else:
            raise SystemExit(f"'{name}' is no way{did_you_mean(name, ['pooled', 'product', *WAYS])}")
    return found


def table(
    bench: Bench,
    part: str,
    studies: Sequence[str],
    wanted: list[tuple[str, str, dict[str, Any]]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Figures by row and study, those of all seeds in a list."""
    found: dict[str, Any] = {}
    for seed in seeds:
        for study in studies:
            for title, method, setting in wanted:
                one = bench.figures(part, study, method, setting, seed)
                if one is not None:
                    found.setdefault(title, {}).setdefault(study, []).append({**one, "seed": seed})
    return found


def markdown(found: dict[str, Any], studies: Sequence[str]) -> str:
    """A table: accuracy (mean, and spread over seeds), the mean over classes, gap to the best pooled.

    The gap is over the seeds that both were run with.
    """
    lines = ["| way |" + "".join(f" {s} | balanced | to pooled | seeds |" for s in studies)]
    lines.append("|---" * (1 + 4 * len(studies)) + "|")
    best = {s: best_pooled(found, s) for s in studies}
    for title, by_study in found.items():
        cells = []
        for study in studies:
            runs = by_study.get(study, [])
            values = [100 * r["accuracy"] for r in runs]
            gaps = [100 * (r["accuracy"] - best[study][r["seed"]]) for r in runs if r["seed"] in best[study]]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if runs else "")
            cells.append(f"{100 * means(runs, 'balanced'):.1f}" if runs else "")
            cells.append(f"{mean(gaps):+.1f}" if gaps else "")
            cells.append(" ".join(str(r["seed"]) for r in runs))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_pooled(found: dict[str, Any], study: str) -> dict[int, float]:
    """Accuracy by seed of pooled training at the rate that is best over its seeds."""
    rows = [v[study] for title, v in found.items() if title.startswith("pooled") and study in v]
    best = max(rows, key=lambda runs: means(runs, "accuracy"), default=[])
    return {run["seed"]: run["accuracy"] for run in best}


def means(runs: Sequence[Mapping[str, float]], key: str) -> float:
    """Mean of a figure over runs."""
    return mean(run[key] for run in runs)


def main() -> None:
    """Run what is missing, print the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    p.add_argument("--sites", type=int, default=4)
    p.add_argument("--alpha", type=float, default=0.1, help="0: the studies' own sites")
    p.add_argument("--steps", type=int, default=120, help="of a site")
    p.add_argument("--validate", nargs="*", default=[])
    p.add_argument("--test", nargs="*", default=[])
    p.add_argument("--rates", type=float, nargs="+", default=list(POOLED_RATES), help="pooled's")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--search-seeds", type=int, nargs="+", default=[11], help="of --validate")
    p.add_argument("--show", action="store_true", help="run nothing")
    p.add_argument("--classes", action="store_true", help="print who has what")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    if "pooled" in a.test and len(a.rates) > 1:
        p.error("--test takes one of --rates, chosen by --validate pooled: the test part chooses nothing")
    os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    bench = Bench(
        Cells(a.out / "cells.sqlite"), sites=a.sites, alpha=a.alpha, steps=a.steps, run_missing=not a.show
    )
    results: dict[str, Any] = {}
    for part, names, seeds in (("validation", a.validate, a.search_seeds), ("test", a.test, a.seeds)):
        if not names:
            continue
        if a.classes:
            print("\n".join(class_table(bench, s, seed, part) for s in a.studies for seed in seeds))
        results[part] = table(bench, part, a.studies, rows(names, a.rates), seeds)
        print(f"\n{part}\n\n{markdown(results[part], a.studies)}\n", flush=True)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
