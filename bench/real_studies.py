"""The studies on real images, and the synthetic one: all methods side by side, with several seeds.

    python -m bench.real_studies --data DIR --out out/real --json out/real.json --markdown out/real.md

Each study and seed is one run by `flwr run`. All methods make the same number of optimiser steps a site;
pooled makes all sites' steps together.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.harness import DATA_HELP, REQUIRED, argument_parser, parse_arguments, write_json
from bench.runs import REAL_STUDIES, run_study
from fedsigma.common.config.study import load_study

STUDIES = (*REAL_STUDIES, "demo")
METHODS = {
    "zero_shot": "zero-shot",
    "local_only": "local only, at home",
    "local_only_everywhere": "local only, everywhere",
    "pooled": "pooled",
    "federated": "federated",
}


def values(summary: dict[str, Any], method: str) -> tuple[float, dict[str, float]]:
    """Return the accuracy over all sites and per site of one method."""
    if method == "local_only_everywhere":
        local = summary["local_only"]
        return local["everywhere"], local["everywhere_per_site"]
    return summary[method]["accuracy"], summary[method]["per_site"]


def combine(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread (standard deviation over seeds) of each method, and the mean per site."""
    table: dict[str, Any] = {}
    for method in METHODS:
        pairs = [values(summary, method) for summary in summaries]
        totals = [total for total, _ in pairs]
        table[method] = {
            "mean": statistics.mean(totals),
            "spread": statistics.stdev(totals) if len(totals) > 1 else 0.0,
            "per_site": {site: statistics.mean(p[site] for _, p in pairs) for site in pairs[0][1]},
            "seeds": totals,
        }
    for key in ("bytes_up_per_site_round", "seconds"):
        table[key] = statistics.mean(summary[key] for summary in summaries)
    table["rounds"] = summaries[0]["rounds"]
    return table


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of docs/research/accuracy.md."""
    lines = []
    for study, table in results.items():
        sites = list(table["zero_shot"]["per_site"])
        lines += [f"### {study}", "", "| method | all sites | " + " | ".join(sites) + " |"]
        lines += ["|---|---" + "|---" * len(sites) + "|"]
        for method, title in METHODS.items():
            row = table[method]
            cells = [f"{100 * row['mean']:.1f} ± {100 * row['spread']:.1f}"]
            cells += [f"{100 * row['per_site'][site]:.1f}" for site in sites]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        upload = f"{table['bytes_up_per_site_round']:,.0f} bytes an upload."
        lines += ["", f"{table['rounds']} rounds, {upload}", ""]
    return "\n".join(lines)


def verdicts(study: str, table: dict[str, Any]) -> list[str]:
    """Return the results of the comparison, one line each."""
    fed, zero = table["federated"], table["zero_shot"]
    better = [site for site in fed["per_site"] if fed["per_site"][site] > zero["per_site"][site]]
    everywhere = 100 * (fed["mean"] - table["local_only_everywhere"]["mean"])
    home = 100 * (fed["mean"] - table["local_only"]["mean"])
    return [
        f"{study}: federated above zero-shot at {len(better)} of {len(fed['per_site'])} sites",
        f"{study}: federated {everywhere:+.1f} points against local-only evaluated everywhere",
        f"{study}: federated reaches {fed['mean'] / table['pooled']['mean']:.1%} of pooled",
        f"{study}: federated {home:+.1f} points against local-only at home",
    ]


def main() -> None:
    """Run what is missing and print the tables."""
    help_text = f"{DATA_HELP}; without it the demo alone"
    p = argument_parser(__doc__, data=help_text, out=REQUIRED, seeds=(1, 2, 3), rounds=0)
    p.add_argument("--studies", nargs="+", choices=STUDIES)
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file")
    options = parse_arguments(p)
    results = {}
    for name in options.studies or (STUDIES if options.data else ("demo",)):
        study = load_study(name)
        folders = {seed: options.out / f"{name}-s{seed}" for seed in options.seeds}
        summaries = [
            run_study(study, folder, seed=seed, rounds=options.rounds) for seed, folder in folders.items()
        ]
        results[name] = combine(summaries)
    print(markdown(results))
    for name, table in results.items():
        print("\n".join(verdicts(name, table)))
    write_json(options.json, results)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
