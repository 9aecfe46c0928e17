"""Keeping some of the shift at the sites, against sharing all of it, on the two studies of real images.

    python -m bench.personal --data DIR --out out/personal --json out/personal.json

DIR holds `wbc_labs.parquet` and `ham10000_sites.parquet`. Each study runs by `flwr run` with its own recipe
and no baselines: with nothing personal, with the text tower, with the bottom third of the image tower
(nearest the pixels, where stain and camera differ), and with the top third of both. Accuracies are over all
sites' test images: of each site's own model (shared values with its own), and of the shared values alone.
Finished runs under --out are not repeated and interrupted ones are gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsigma.common.config.sigma import PersonalConfig
from fedsigma.common.config.study import StudyConfig, load_study
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.simulate import run_simulation

STUDIES = ("white-cells-four-labs", "dermoscopy-four-sites")
SETTINGS: dict[str, PersonalConfig | None] = {
    "nothing": None,
    "text": PersonalConfig(towers=("text",)),
    "image-bottom": PersonalConfig(towers=("image",), layers="bottom"),
    "top": PersonalConfig(layers="top"),
}


def summary(study: StudyConfig, setting: str, seed: int, out: Path) -> dict[str, Any]:
    """The summary of one run, made now unless it was before."""
    folder = out / f"{study.name}-{setting}-s{seed}"
    if not (folder / "summary.json").exists():
        federation = replace(study.federation, evaluate_every=study.federation.rounds)
        wanted = replace(study, federation=federation, baselines=(), personal=SETTINGS[setting])
        out.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(wanted.to_yaml(), encoding="utf-8")
        code = run_simulation(str(file), out=folder, seed=seed, resume=(folder / "study.yaml").exists())
        if code:
            raise SystemExit(f"{study.name}, {setting}, seed {seed}: the run ended with code {code}")
    return RunDir.open(folder).read_summary()


def row(study: str, setting: str, seeds: list[int], out: Path) -> dict[str, Any]:
    """Mean accuracies of one setting over the seeds, and the bytes of an upload."""
    runs = [summary(load_study(study), setting, seed, out) for seed in seeds]
    own = [run["federated"]["accuracy"] for run in runs]
    shared = [run.get("shared_only", run["federated"])["accuracy"] for run in runs]
    return {
        "study": study,
        "personal": setting,
        "accuracy": statistics.mean(own),
        "shared_only": statistics.mean(shared),
        "seeds": own,
        "seeds_shared_only": shared,
        "bytes": runs[0]["bytes_up_per_site_round"],
    }


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    os.environ["FEDSIGMA_DATA"] = str(a.data.resolve())
    rows = [row(study, name, a.seeds, a.out.resolve()) for name in a.settings for study in STUDIES]
    print(f"{'study':<24}{'personal':<14}{'own model':>10}{'shared':>8}{'bytes':>9}  seeds")
    for r in sorted(rows, key=lambda r: STUDIES.index(r["study"])):
        seeds = ", ".join(f"{100 * v:.1f}" for v in r["seeds"])
        print(
            f"{r['study']:<24}{r['personal']:<14}{100 * r['accuracy']:>10.1f}{100 * r['shared_only']:>8.1f}"
            f"{r['bytes']:>9}  {seeds}"
        )
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
