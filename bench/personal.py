"""Keeping part of the shift at the sites, against sharing all of it, on the two studies of real images.

    python -m bench.personal --data DIR --out out/personal --json out/personal.json

Each study runs with its own recipe and no baselines: with nothing personal, with the text tower, with the
bottom third of the image tower (nearest the pixels, where stain and camera differ), and with the top third of
both. Accuracies are over all sites' test images: of each site's own model (shared and personal values), and
of the shared values alone.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.harness import REQUIRED, Table, argument_parser, parse_arguments, write_json
from bench.runs import REAL_STUDIES, run_study
from fedsigma.common.config.sigma import PersonalConfig
from fedsigma.common.config.study import load_study

SETTINGS: dict[str, PersonalConfig | None] = {
    "nothing": None,
    "text": PersonalConfig(towers=("text",)),
    "image-bottom": PersonalConfig(towers=("image",), layers="bottom"),
    "top": PersonalConfig(layers="top"),
}


def measure(name: str, setting: str, seeds: list[int], out: Path) -> dict[str, Any]:
    """Return the mean accuracies of one setting over the seeds, and the bytes of an upload."""
    study = load_study(name)
    federation = replace(study.federation, evaluate_every=study.federation.rounds)
    study = replace(study, federation=federation, baselines=(), personal=SETTINGS[setting])
    runs = [run_study(study, out / f"{name}-{setting}-s{seed}", seed=seed) for seed in seeds]
    personal = [run["federated"]["accuracy"] for run in runs]
    shared = [run.get("shared_only", run["federated"])["accuracy"] for run in runs]
    return {
        "study": name,
        "personal": setting,
        "accuracy": statistics.mean(personal),
        "shared_only": statistics.mean(shared),
        "seeds": personal,
        "seeds_shared_only": shared,
        "bytes": runs[0]["bytes_up_per_site_round"],
    }


def main() -> None:
    """Run what is missing and print the table."""
    p = argument_parser(__doc__, data=REQUIRED, out=REQUIRED, seeds=(1, 2, 3))
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parse_arguments(p)
    rows = [measure(s, name, options.seeds, options.out) for name in options.settings for s in REAL_STUDIES]
    columns = {"study": "<23", "personal": "<13", "own model": ">10.1f", "shared": ">7.1f", "bytes": ">8"}
    table = Table(columns | {"seeds": "<"})
    for row in sorted(rows, key=lambda row: REAL_STUDIES.index(row["study"])):
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
        accuracies = 100 * row["accuracy"], 100 * row["shared_only"]
        table.row(row["study"], row["personal"], *accuracies, row["bytes"], seeds)
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
