"""Other methods beside sigma: accuracy against bytes sent, on the two studies of real images.

    python -m bench.methods --data DIR --out out/methods --json out/methods.json \\
        --figure docs/figures/pareto.png

With --studies also the sets of `studies.py`, as parquet files in DIR. Every method has the study's backbone,
images, seeds, rounds, local steps, batches, augmentation, optimiser and strategy. Its learning rate is chosen
with one seed on images of the training part that the few-shot draw left over, in a grid that is extended
beyond a best end; all that was tried is printed. With --search-study the rates of one study serve for all.
Models with trained towers are evaluated on those images and on the test images by one run of the first seed;
the others, whose image features are computed once, are searched with a seed of their own.

Each run is kept in --out/cells.jsonl when it is done, so an interrupted call can be repeated, and several may
run side by side, each on other studies. `--show` prints the finished cells and runs nothing.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from bench.cell_store import CellStore
from bench.harness import REQUIRED, argument_parser, parse_arguments, write_json
from bench.methods.catalogue import CANDIDATES
from bench.methods.cells import MAX_RATES, Plan
from bench.methods.figure import draw
from bench.methods.studies import SETS
from bench.methods.tables import combine, markdown, print_search, verdicts
from bench.runs import REAL_STUDIES


def collect(plan: Plan, study: str, methods: list[str], seeds: list[int]) -> dict[str, Any]:
    """Return rows by method, over the seeds that all have: draws differ by more than methods do.

    All methods of one seed run before the next, so that an interrupted call has complete comparisons.
    """
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in seeds:
        for method in methods:
            figures = plan.tested(study, method, seed)
            if figures is not None:
                runs[method].append({**figures, "seed": seed})
    runs = {method: rows for method, rows in runs.items() if rows}
    common = set(seeds).intersection(*({row["seed"] for row in rows} for rows in runs.values()))
    for method, rows in runs.items():
        if left := sorted({row["seed"] for row in rows} - common):
            print(f"{study}: seeds {left} of {method} are left out: other methods lack them")
    if runs and not common:
        raise SystemExit(f"{study}: no seed has been run with all methods: name fewer --methods")
    return {method: combine([r for r in rows if r["seed"] in common]) for method, rows in runs.items()}


def main() -> None:
    """Run what is missing and print the tables."""
    p = argument_parser(__doc__, data=REQUIRED, out=REQUIRED, seeds=(1, 2, 3), rounds=60)
    p.add_argument("--studies", nargs="+", choices=[*REAL_STUDIES, *SETS], default=list(REAL_STUDIES))
    p.add_argument("--methods", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    p.add_argument("--search-study", choices=REAL_STUDIES, help="whose learning rates serve for all")
    p.add_argument("--most-rates", type=int, default=MAX_RATES, help="tried of methods that train towers")
    p.add_argument("--show", action="store_true", help="run nothing")
    p.add_argument("--figure", type=Path)
    options = parse_arguments(p)
    # Flower's QFedAvg collects garbage for each reply: exclude all that was imported.
    gc.freeze()
    plan = Plan(
        CellStore(options.out / "cells.jsonl"),
        rounds=options.rounds,
        search_study=options.search_study,
        max_rates=options.most_rates,
        run_missing=not options.show,
    )
    results: dict[str, Any] = {}
    for study in options.studies:
        rows = collect(plan, study, options.methods, options.seeds)
        trials = {method: plan.search(study, method) or [] for method in options.methods}
        results[study] = {"rounds": options.rounds, "rows": rows, "search": trials}
        print_search(study, trials)
        if options.search_study not in (None, study):
            print(f"Learning rates, except those of a cache, were searched on {options.search_study}.")
        print(markdown(study, rows))
        print("\n".join(verdicts(study, rows)))
    write_json(options.json, results)
    if options.figure:
        draw({study: result["rows"] for study, result in results.items()}, options.figure)


if __name__ == "__main__":
    main()
