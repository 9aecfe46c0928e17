"""Synthetic run folders: invented numbers in the shape of a real run, for tests and for looking at reports.

Nothing here was measured. Run `python tests/helpers/synthetic_run.py OUT` to write one folder of each kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.registry.shift_file import save_shift
from fedsigma.common.sigma.layout import Entry, Layout
from fedsigma.server.federation.validation import metrics_of_confusion
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.runs.shift_magnitude import shift_magnitudes, to_towers

PARTS = ("q", "k", "v", "o", "mlp", "mlp")
UPLOAD, DOWNLOAD = 61_700, 58_200


def synthetic_layout(*, image: tuple[int, int] = (12, 192), text: tuple[int, int] = (4, 128)) -> Layout:
    """A layout of two towers, each (layers, width), with made-up weight names."""
    entries: list[Entry] = []
    offset = 0
    for tower, (layers, width) in {"image": image, "text": text}.items():
        for layer in range(layers):
            for index, part in enumerate(PARTS):
                name = f"{tower}.{layer}.{index}"
                entry = Entry(
                    weight=name,
                    part=part,
                    tower=tower,
                    layer=layer,
                    offset=offset,
                    size=width,
                    rows=(0, width),
                )
                entries.append(entry)
                offset += width
    return Layout(entries=tuple(entries))


def synthetic_shift(layout: Layout, *, seed: int = 0) -> np.ndarray:
    """A shift that is larger in late layers of the image tower and in v, o and mlp."""
    rng = np.random.default_rng(seed)
    weights = {"q": 0.5, "k": 0.4, "v": 1.0, "o": 1.2, "mlp": 0.9}
    pieces = [
        rng.normal(
            0, 0.02 * weights[e.part] * (1 + 0.15 * e.layer) * (0.5 if e.tower == "text" else 1), e.size
        )
        for e in layout.entries
    ]
    return np.concatenate(pieces).astype(np.float32)


def synthetic_study(*, name: str, rounds: int, classes: list[str]) -> str:
    """A study file as the server would write it."""
    study = {
        "name": name,
        "backbone": "starter",
        "classes": classes,
        "template": "a photo of a {}.",
        "data": {
            "source": "demo",
            "sites_by": "site",
            "on_problem": "stop",
            "test_share": 0.5,
            "options": {},
        },
        "shots": 16,
        "sigma": {"towers": ["image", "text"], "layers": "all", "parts": ["q", "k", "v", "o", "mlp"]},
        "training": {"learning_rate": 0.01, "batch_size": 32, "local_steps": 20, "weight_decay": 0.0},
        "federation": {"strategy": "fedavg", "rounds": rounds, "min_sites": 2, "round_timeout_s": 600},
        "baselines": ["zero_shot", "local_only", "pooled"],
        "seed": 1,
    }
    return yaml.safe_dump(study, sort_keys=False, allow_unicode=True)


def write_synthetic_run(
    path: Path,
    *,
    name: str = "synthetic-blood-smears",
    sites: list[str] | None = None,
    classes: list[str] | None = None,
    rounds: int = 10,
    finished: int | None = None,
    fail: str = "",
    baselines: tuple[str, ...] = ("zero_shot", "local_only", "pooled"),
    troubles: bool = True,
    seed: int = 0,
) -> RunDir:
    """Write a run of which `finished` rounds are done (all of them by default)."""
    sites = ["north", "east", "south", "west"] if sites is None else sites
    classes = classes or ["neutrophil", "lymphocyte", "monocyte", "eosinophil"]
    done = rounds if finished is None else finished
    rng = np.random.default_rng(seed)
    study = synthetic_study(name=name, rounds=rounds, classes=classes)
    folder = RunDir.create(path, study)
    folder.log_event("run_start", study=name)
    for site in sites:
        folder.log_event("site_ready", site=site)
    if troubles:
        folder.log_event("site_refused", site="annex", reason="its backbone weights differ from the study's")
    curves = _curves(sites, done, rng)
    for number in range(1, done + 1):
        _write_round(folder, number, sites, curves, rng, troubles=troubles)
    layout = synthetic_layout()
    for number in range(1, done + 1):
        grown = synthetic_shift(layout, seed=seed) * np.float32(number / done)
        folder.log_shift_magnitude(number, to_towers(shift_magnitudes(grown, layout)))
    if done:
        fingerprint = json.dumps({"weights": "0" * 64, "layout": layout.digest, "sketch": [0.0]})
        save_shift(
            folder.shift_path,
            synthetic_shift(layout, seed=seed),
            layout_json=layout.to_json(),
            fingerprint_json=fingerprint,
            study_yaml=study,
            round=done,
        )
    if fail:
        folder.log_event("run_end", ok=False, reason=fail)
    elif done == rounds:
        _write_rows(folder, done + 1, sites, curves, rng, final=True)
        summary = _summary(name, sites, classes, curves, done, baselines, rng)
        for method in baselines:
            folder.log_event("baseline", method=method, site=ALL_SITES, metrics=summary[method]["metrics"])
        folder.write_summary(summary)
        folder.log_event("run_end", ok=True, reason="")
    return folder


def _curves(sites: list[str], rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Accuracy by site and number of finished rounds.  Shapes: (sites, rounds + 1)."""
    steps = np.arange(rounds + 1)
    start = rng.normal(0.33, 0.05, (len(sites), 1)).clip(0.15, 0.5)
    end = rng.normal(0.66, 0.06, (len(sites), 1)).clip(0.45, 0.9)
    rise = 1 - np.exp(-steps / max(2.0, rounds / 3.5))
    noise = rng.normal(0, 0.012, (len(sites), rounds + 1)) * (steps > 0)
    return (start + (end - start) * rise + noise).clip(0.02, 0.99)


def _write_round(
    folder: RunDir,
    number: int,
    sites: list[str],
    curves: np.ndarray,
    rng: np.random.Generator,
    *,
    troubles: bool,
) -> None:
    folder.log_event("round_start", round=number, sites=sites)
    lost = _lost(number, sites) if troubles else {}
    _write_rows(folder, number, sites, curves, rng, lost=lost)
    for site in sites:
        status, reason = lost.get(site, ("accepted", ""))
        if status == "accepted":
            folder.log_event("reply_accepted", round=number, site=site, bytes=UPLOAD, metrics={"loss": 1.0})
        elif status == "rejected":
            folder.log_event("reply_rejected", round=number, site=site, reason=reason)
        elif status == "late":
            folder.log_event("site_timed_out", round=number, site=site)
        else:
            folder.log_event("site_failed", round=number, site=site, reason=reason)
    folder.log_event("round_end", round=number, sites=sites, seconds=18.4)


def _lost(number: int, sites: list[str]) -> dict[str, tuple[str, str]]:
    """What went wrong in this round: site -> status and reason."""
    last = sites[-1] if sites else "nobody"
    if number in (3, 4, 5, 8):
        return {last: ("rejected", "the shift's norm 81.2 is above the bound 50")}
    if number == 6:
        first = sites[0] if sites else "nobody"
        return {first: ("late", "no reply within 600 s")} | {last: ("failed", "OutOfMemoryError")}
    return {}


def _write_rows(
    folder: RunDir,
    number: int,
    sites: list[str],
    curves: np.ndarray,
    rng: np.random.Generator,
    *,
    lost: dict[str, tuple[str, str]] | None = None,
    final: bool = False,
) -> None:
    at = curves[:, number - 1]
    for index, site in enumerate(sites):
        status, reason = (lost or {}).get(site, ("accepted", ""))
        metrics = _metrics(float(at[index]), rng) | {"loss": 2.2 - 1.5 * float(at[index])}
        metrics |= {"examples": 64 - index % 7, "test_examples": 130 + index}
        if not final:
            metrics |= _drift(number, rng)
        told = metrics if status == "accepted" else {}
        folder.log_round(number, site, told, 0 if final else UPLOAD, DOWNLOAD, status, reason)
    if sites:
        folder.log_round(number, ALL_SITES, _metrics(float(at.mean()), rng), 0, 0, ALL_SITES)


def _drift(number: int, rng: np.random.Generator) -> dict[str, float]:
    norm = float(rng.uniform(0.8, 1.2)) / number**0.5
    cosine = float(rng.uniform(0.3, 0.6)) + 0.4 / number
    return {"update_norm": norm, "update_cosine": cosine, "shift_norm": norm * number}


def _metrics(accuracy: float, rng: np.random.Generator) -> dict[str, float]:
    lower = float(rng.uniform(0.01, 0.04))
    return {
        "accuracy": accuracy,
        "balanced_accuracy": accuracy - lower,
        "auroc": min(0.99, 0.5 + 0.55 * accuracy),
        "f1": accuracy - 1.2 * lower,
        "ece": 0.25 - 0.2 * accuracy,
    }


def _summary(
    name: str,
    sites: list[str],
    classes: list[str],
    curves: np.ndarray,
    rounds: int,
    baselines: tuple[str, ...],
    rng: np.random.Generator,
) -> dict[str, Any]:
    per_site = {
        "zero_shot": curves[:, 0],
        "local_only": (curves[:, -1] + rng.normal(0.0, 0.06, len(sites))).clip(0.1, 0.98),
        "pooled": (curves[:, -1] + rng.normal(0.03, 0.02, len(sites))).clip(0.1, 0.99),
        "federated": curves[:, -1],
    }
    summary: dict[str, Any] = {
        "study": name,
        "rounds": rounds,
        "seconds": 201.7,
        "bytes_up_per_site_round": UPLOAD,
        "bytes_down_per_site_round": DOWNLOAD,
        "sites": sites,
        "classes": classes,
    }
    for method in (*baselines, "federated"):
        values = per_site[method]
        summary[method] = {
            "accuracy": float(values.mean()),
            "per_site": {site: float(value) for site, value in zip(sites, values, strict=True)},
            "metrics": _metrics(float(values.mean()), rng),
        }
    counts = 40 * np.eye(len(classes), dtype=int) + np.arange(len(classes))
    summary["federated"]["confusion"] = {
        "per_site": {},
        "all_sites": counts.tolist(),
        "metrics": metrics_of_confusion(counts),
    }
    if "local_only" in summary:
        everywhere = (per_site["zero_shot"] + 0.12).clip(0, 0.98)
        summary["local_only"]["everywhere"] = float(everywhere.mean())
        summary["local_only"]["everywhere_per_site"] = dict(zip(sites, everywhere.tolist(), strict=True))
    return summary


HOSTILE = ['<script>alert("x")</script>', "a & b <img src=http://x.test/p.png>", "$\\alpha$ {{ 7*7 }} clinic"]
LONG_CLASSES = [
    "actinic keratosis or intraepithelial carcinoma of the lower leg in patients over sixty",
    "benign keratosis",
    "a-class-name-without-any-place-to-break-it-that-runs-on-and-on-and-on-for-more-than-eighty-letters",
    "melanocytic nevus",
]


def main(out: Path) -> None:
    """Write one run folder and report of each kind."""
    from fedsigma.server.report import write_report

    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "one-site": {"sites": ["only"], "troubles": False},
        "fifty-sites": {"sites": [f"hospital-{i:02d}" for i in range(1, 51)], "rounds": 40},
        "two-hundred-rounds": {"rounds": 200},
        "no-rounds": {"finished": 0, "troubles": False},
        "failed": {"finished": 2, "fail": "no round produced a model: every site failed"},
        "bare": {"baselines": (), "troubles": False},
        "hostile": {"sites": HOSTILE, "classes": LONG_CLASSES, "name": "<b>bold</b> & co"},
    }
    for kind, options in kinds.items():
        print(write_report(write_synthetic_run(out / kind, **options)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
