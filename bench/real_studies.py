"""The studies on real images, and the synthetic one: four methods side by side, several seeds.

    python -m bench.real_studies --data DIR --out out/real --json out/real.json --markdown out/real.md

DIR holds `wbc_labs.parquet` and `ham10000_sites.parquet` (columns image, label, site, group, split). Each
study and seed is one real run by `flwr run`, kept in its own folder under --out; a finished run is not
repeated and an interrupted one is gone on with, so a call that was cut off can simply be made again. All
methods make the same number of optimiser steps a site; pooled makes all sites' steps together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.simulate import run_simulation

STUDIES = ("white-cells-four-labs", "dermoscopy-four-sites", "demo")
METHODS = ("zero_shot", "local_only", "local_only_everywhere", "pooled", "federated")
TITLES = ("zero-shot", "local only, at home", "local only, everywhere", "pooled", "federated")


def run(study: str, seed: int, out: Path, rounds: int | None) -> dict[str, Any]:
    """The summary of one study and seed, run now unless it was before."""
    folder = out / f"{study}-s{seed}"
    if not (folder / "summary.json").exists() or "pooled" not in RunDir.open(folder).read_summary():
        begun = (folder / "study.yaml").exists()
        code = run_simulation(study, out=folder, seed=seed, rounds=rounds or 0, resume=begun)
        if code:
            raise SystemExit(f"study {study}, seed {seed}: the run ended with code {code}, see {folder}")
    return RunDir.open(folder).read_summary()


def values(summary: dict[str, Any], method: str) -> tuple[float, dict[str, float]]:
    """Accuracy over all and per site of one method."""
    if method == "local_only_everywhere":
        local = summary["local_only"]
        return local["everywhere"], local["everywhere_per_site"]
    return summary[method]["accuracy"], summary[method]["per_site"]


def combine(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (standard deviation over seeds) of each method; per site the mean."""
    found = list(summaries)
    table: dict[str, Any] = {}
    for method in METHODS:
        pairs = [values(s, method) for s in found]
        totals = [total for total, _ in pairs]
        table[method] = {
            "mean": statistics.mean(totals),
            "spread": statistics.stdev(totals) if len(totals) > 1 else 0.0,
            "per_site": {site: statistics.mean(p[site] for _, p in pairs) for site in pairs[0][1]},
            "seeds": totals,
        }
    table["bytes_up_per_site_round"] = statistics.mean(s["bytes_up_per_site_round"] for s in found)
    table["rounds"], table["seconds"] = found[0]["rounds"], statistics.mean(s["seconds"] for s in found)
    return table


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/research/accuracy.md."""
    lines = []
    for study, table in results.items():
        sites = list(table["zero_shot"]["per_site"])
        lines += [f"### {study}", "", "| method | all sites | " + " | ".join(sites) + " |"]
        lines += ["|---|---" + "|---" * len(sites) + "|"]
        for method, title in zip(METHODS, TITLES, strict=True):
            row = table[method]
            cells = [f"{100 * row['mean']:.1f} ± {100 * row['spread']:.1f}"]
            cells += [f"{100 * row['per_site'][site]:.1f}" for site in sites]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"{table['rounds']} rounds, {table['bytes_up_per_site_round']:,.0f} bytes an upload.",
            "",
        ]
    return "\n".join(lines)


def verdicts(study: str, table: dict[str, Any]) -> list[str]:
    """What the comparison says, in one line each."""
    fed, zero = table["federated"], table["zero_shot"]
    better = [site for site in fed["per_site"] if fed["per_site"][site] > zero["per_site"][site]]
    everywhere = 100 * (fed["mean"] - table["local_only_everywhere"]["mean"])
    home = 100 * (fed["mean"] - table["local_only"]["mean"])
    return [
        f"{study}: federated above zero-shot at {len(better)} of {len(fed['per_site'])} sites",
        f"{study}: federated {everywhere:+.1f} points against local-only judged everywhere",
        f"{study}: federated reaches {fed['mean'] / table['pooled']['mean']:.1%} of pooled",
        f"{study}: federated {home:+.1f} points against local-only at home",
    ]


def main() -> None:
    """Run what is missing, print the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="folder of the two parquet files; without it the demo alone")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--studies", nargs="+", choices=STUDIES)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--rounds", type=int, help="other than the study's, for a quick look")
    p.add_argument("--json", type=Path)
    p.add_argument("--markdown", type=Path)
    a = p.parse_args()
    if a.data:
        os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    studies = a.studies or (STUDIES if a.data else ("demo",))
    results = {s: combine(run(s, seed, a.out.resolve(), a.rounds) for seed in a.seeds) for s in studies}
    print(markdown(results))
    for study, table in results.items():
        print("\n".join(verdicts(study, table)))
    for path, text in ((a.json, json.dumps(results, indent=2) + "\n"), (a.markdown, markdown(results))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
