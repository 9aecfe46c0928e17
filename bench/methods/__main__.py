"""The field's methods beside sigma: accuracy against bytes sent, on the two studies of real images.

    python -m bench.methods --data DIR --out out/methods --json out/methods.json \\
        --figure docs/figures/pareto.png

Run it from the project's folder. DIR holds `wbc_labs.parquet` and `ham10000_sites.parquet`, or, with
--studies, the sets of `studies.py` as parquet files. Every method has the study's backbone, images, seeds,
rounds, local steps, batches, augmentation, optimiser and strategy. Its learning rate is chosen on images of
the training part that the few-shot draw left over, one seed, in a grid that goes on past a best end; all that
was tried is printed. With --search-study the rates of one study serve for all. Models with trained towers are
judged on those images and on the test images by one run of the first seed; the others, whose image tower's
features are computed once, are searched with a seed of their own.
Each run is kept in --out/cells.sqlite when it is done, so a call that was cut off can simply be made again,
and several may run side by side, each on other studies. `--show` prints what is there and runs nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

from bench.methods.catalogue import CANDIDATES
from bench.methods.cells import MOST_RATES, Cells, Plan
from bench.methods.figure import draw
from bench.methods.studies import REAL, SETS
from bench.methods.tables import combine, markdown, print_search, verdicts


def collect(plan: Plan, study: str, methods: list[str], seeds: list[int]) -> dict[str, Any]:
    """Rows by method, over the seeds that all of them have: draws differ by more than methods do.

    They are run seed by seed, so that a call that is cut off has whole comparisons.
    """
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            found = plan.tested(study, method, seed)
            if found is not None:
                runs[method].append({**found, "seed": seed})
    runs = {method: found for method, found in runs.items() if found}
    common = set(seeds).intersection(*({run["seed"] for run in found} for found in runs.values()))
    for method, found in runs.items():
        if left := sorted({run["seed"] for run in found} - common):
            print(f"{study}: {method} has seeds {left}, too, which not all others have")
    if runs and not common:
        raise SystemExit(f"{study}: no seed has been run of all methods: name fewer --methods")
    return {
        method: combine([run for run in found if run["seed"] in common]) for method, found in runs.items()
    }


def main() -> None:
    """Run what is missing, print the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--studies", nargs="+", choices=[*REAL, *SETS], default=list(REAL))
    p.add_argument("--methods", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--rounds", type=int, default=60)
    p.add_argument("--search-study", choices=REAL, help="whose learning rates serve for all")
    p.add_argument("--most-rates", type=int, default=MOST_RATES, help="tried of a trained tower")
    p.add_argument("--show", action="store_true", help="run nothing")
    p.add_argument("--json", type=Path)
    p.add_argument("--figure", type=Path)
    a = p.parse_args()
    # Flower's QFedAvg collects garbage for each reply: not through all that was imported each time.
    gc.freeze()
    os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    cells = Cells(a.out / "cells.sqlite")
    plan = Plan(
        cells,
        rounds=a.rounds,
        search_study=a.search_study,
        most_rates=a.most_rates,
        run_missing=not a.show,
    )
    results: dict[str, Any] = {}
    for study in a.studies:
        rows = collect(plan, study, a.methods, a.seeds)
        tried = {method: plan.search(study, method) or [] for method in a.methods}
        results[study] = {"rounds": a.rounds, "rows": rows, "search": tried}
        print_search(study, tried)
        if a.search_study not in (None, study):
            print(f"Learning rates, but those of a cache, were searched on {a.search_study}.")
        print(markdown(study, rows))
        print("\n".join(verdicts(study, rows)))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=2) + "\n")
    if a.figure:
        draw({study: found["rows"] for study, found in results.items()}, a.figure)


if __name__ == "__main__":
    main()
