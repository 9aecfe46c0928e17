"""Sites that differ: what they cost against pooled training, and which candidates reduce it.

    python -m bench.gap --data DIR --out out/gap --json out/gap.json

Both studies of real images, divided among --sites sites by a Dirichlet distribution. All methods make --steps
steps a site in batches of 16; pooled makes all sites' steps one after the other. --validate names candidates
that are evaluated on images of the training part that the few-shot draw left over, --test those evaluated on
the test part, among them `product`, the bundled recipe by the real apps. Each run is kept in
--out/cells.jsonl, so an interrupted call can be repeated.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from bench.cell_store import CellStore
from bench.gap.catalogue import CANDIDATES, POOLED_RATES
from bench.gap.cells import Runner
from bench.harness import REQUIRED, argument_parser, parse_arguments, write_json
from bench.runs import REAL_STUDIES
from fedsigma.common.config.schema import did_you_mean

Rows = dict[str, dict[str, list[dict[str, Any]]]]
"""Figures of each seed, by row and study."""


def print_classes(runner: Runner, name: str, seed: int, part: str) -> None:
    """Print the training images by site and class, and the number of images to evaluate on."""
    study = runner.study(name, seed)
    print(f"{name}, seed {seed}, {part}: training images by class; images to evaluate on")
    for site, (train, held_out) in runner.images(study, part).items():
        counts = Counter(e.label for e in train)
        row = " ".join(f"{counts[c]:3d}" for c in range(len(study.classes)))
        print(f"  {site:16s} {row}   {len(held_out)}")


def methods(names: Sequence[str], rates: Sequence[float]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return title, method and setting of every row."""
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for name in names:
        if name == "product":
            rows.append((name, name, {}))
        elif name == "pooled":
            rows += [(f"pooled, rate {rate:g}", name, {"learning_rate": rate}) for rate in rates]
        elif name in CANDIDATES:
            rows.append((name, "candidate", asdict(CANDIDATES[name])))
        else:
            raise SystemExit(
                f"unknown method '{name}'{did_you_mean(name, ['pooled', 'product', *CANDIDATES])}"
            )
    return rows


def collect(runner: Runner, part: str, names: Sequence[str], options: argparse.Namespace) -> Rows:
    """Return the figures of all rows; those of all methods for one seed before the next."""
    rows: Rows = {}
    for seed in options.seeds if part == "test" else options.search_seeds:
        for study in options.studies:
            for title, method, setting in methods(names, options.rates):
                figures = runner.figures(part, study, method, setting, seed)
                if figures is not None:
                    rows.setdefault(title, {}).setdefault(study, []).append({**figures, "seed": seed})
    return rows


def markdown(rows: Rows, studies: Sequence[str]) -> str:
    """Return a table: accuracy (mean and spread over seeds), balanced accuracy, gap to the best pooled.

    The gap is over the seeds for which both were run.
    """
    lines = ["| method |" + "".join(f" {s} | balanced | to pooled | seeds |" for s in studies)]
    lines.append("|---" * (1 + 4 * len(studies)) + "|")
    best = {study: _best_pooled(rows, study) for study in studies}
    for title, by_study in rows.items():
        cells = []
        for study in studies:
            runs = by_study.get(study, [])
            values = [100 * run["accuracy"] for run in runs]
            gaps = [100 * (r["accuracy"] - best[study][r["seed"]]) for r in runs if r["seed"] in best[study]]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}" if runs else "")
            cells.append(f"{100 * _mean(runs, 'balanced_accuracy'):.1f}" if runs else "")
            cells.append(f"{mean(gaps):+.1f}" if gaps else "")
            cells.append(" ".join(str(run["seed"]) for run in runs))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best_pooled(rows: Rows, study: str) -> dict[int, float]:
    """Return the accuracy by seed of pooled training at the rate with the best mean."""
    pooled = [by_study[study] for t, by_study in rows.items() if t.startswith("pooled") and study in by_study]
    best = max(pooled, key=lambda runs: _mean(runs, "accuracy"), default=[])
    return {run["seed"]: run["accuracy"] for run in best}


def _mean(runs: Sequence[Mapping[str, float]], key: str) -> float:
    return mean(run[key] for run in runs)


def main() -> None:
    """Run what is missing and print the tables."""
    p = argument_parser(__doc__, data=REQUIRED, out=REQUIRED, seeds=(1, 2, 3))
    p.add_argument("--studies", nargs="+", choices=REAL_STUDIES, default=list(REAL_STUDIES))
    p.add_argument("--sites", type=int, default=4)
    p.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet distribution; 0: own sites")
    p.add_argument("--steps", type=int, default=120, help="steps of a site")
    p.add_argument("--validate", nargs="*", default=[], help="methods evaluated on validation images")
    p.add_argument("--test", nargs="*", default=[], help="methods evaluated on test images")
    p.add_argument("--rates", type=float, nargs="+", default=list(POOLED_RATES), help="of pooled training")
    p.add_argument("--search-seeds", type=int, nargs="+", default=[11], help="seeds of --validate")
    p.add_argument("--show", action="store_true", help="run nothing")
    p.add_argument("--classes", action="store_true", help="print the number of images by site and class")
    options = parse_arguments(p)
    if "pooled" in options.test and len(options.rates) > 1:
        p.error("--test takes one of --rates: choose it by --validate pooled, not on the test part")
    runner = Runner(
        CellStore(options.out / "cells.jsonl"),
        sites=options.sites,
        alpha=options.alpha,
        steps=options.steps,
        run_missing=not options.show,
    )
    results: dict[str, Any] = {}
    for part, names in (("validation", options.validate), ("test", options.test)):
        if names:
            if options.classes:
                for study in options.studies:
                    for seed in options.seeds if part == "test" else options.search_seeds:
                        print_classes(runner, study, seed, part)
            results[part] = collect(runner, part, names, options)
            print(f"\n{part}\n\n{markdown(results[part], options.studies)}\n", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
