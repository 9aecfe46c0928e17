"""The results of a study: the final model and the baselines, evaluated at the sites, as summary.json has
them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.training.trainer import Trainer
from fedsigma.common.wire.records import Evaluation
from fedsigma.server.evaluation.baselines import evaluate_shifts, local_only, method_entry, pooled
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.federation.validation import SiteEvaluation
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["evaluate_study", "write_summary"]


def evaluate_study(
    federation: Federation, trainer: Trainer, shift: NDArray[np.float32], started: float
) -> dict[str, Any]:
    """Evaluate the final model and compute the study's baselines; the summary is written after each of them.

    Args:
        federation: The sites and the run folder.
        trainer: Trains the pooled baseline.
        shift: The final global shift, shape (shared values,).
        started: When the run started, by `time.monotonic`.

    Returns:
        The summary, as docs/run-folder.md describes it.

    Raises:
        NoModel: No site could evaluate the final model.
    """
    study, run_dir = federation.study, federation.run_dir
    last = study.federation.rounds + 1
    shifts, evaluated = {"shared_only": shift}, dict[str, dict[str, SiteEvaluation]]()
    if "zero_shot" in study.baselines:
        evaluated["zero_shot"] = _first_round(run_dir)
        if set(federation.site_manager.available().values()) - set(evaluated["zero_shot"]):
            # A site failed in the first round; evaluating at all sites again needs no further message.
            shifts["zero_shot"] = np.zeros(federation.layout.size, np.float32)
    # A site uses the shared values with its own; without personal values the two models are the same.
    if not federation.partition.personal_size:
        evaluated |= evaluate_shifts(federation, shifts, round=last)
        evaluated["federated"] = evaluated.pop("shared_only")
    else:
        evaluated |= evaluate_shifts(federation, {"federated": shift}, round=last, personal=True)
        evaluated |= evaluate_shifts(federation, shifts, round=last)
    if not evaluated["federated"]:
        raise NoModel("no site could evaluate the final model")
    for site, evaluation in evaluated["federated"].items():
        run_dir.log_round(last, site, evaluation.metrics(), 0, 0, "accepted")
    entries: dict[str, dict[str, Any]] = {
        method: method_entry(evaluated[method])
        for method in ("zero_shot", "federated", "shared_only")
        if method in evaluated
    }
    run_dir.log_round(last, ALL_SITES, entries["federated"]["metrics"], 0, 0, ALL_SITES)
    if "zero_shot" in entries:
        metrics = entries["zero_shot"]["metrics"]
        run_dir.log_event("baseline", method="zero_shot", site=ALL_SITES, metrics=metrics)
    summary: dict[str, Any] = {
        "study": study.name,
        "rounds": study.federation.rounds,
        "sites": sorted(evaluated["federated"]),
        "classes": list(study.classes),
        **_bytes_per_round(run_dir),
        **entries,
    }
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        "local_only": lambda: local_only(federation),
        "pooled": lambda: pooled(federation, trainer),
    }
    for method, compute in methods.items():
        write_summary(run_dir, summary, started)
        if method in study.baselines and (entry := compute()):
            summary[method] = entry
    write_summary(run_dir, summary, started)
    return summary


def write_summary(run_dir: RunDir, summary: dict[str, Any], started: float) -> None:
    """Write summary.json, with the seconds since `started` (by `time.monotonic`)."""
    summary["seconds"] = round(time.monotonic() - started, 1)
    run_dir.write_summary(summary)


def _first_round(run_dir: RunDir) -> dict[str, SiteEvaluation]:
    """The sites' evaluations of the zero shift, which every site reports in round 1."""
    evaluations = {}
    for row in run_dir.rounds():
        if row["round"] == 1 and row["status"] == "accepted" and row["test_examples"]:
            metrics = {name: value for name, value in row.items() if value is not None}
            evaluation = Evaluation.of(metrics, row["test_examples"])
            evaluations[row["site"]] = SiteEvaluation(**vars(evaluation))
    return evaluations


def _bytes_per_round(run_dir: RunDir) -> dict[str, int]:
    """Bytes of one site's exchange in one round, each way: the mean over accepted replies."""
    rows = [row for row in run_dir.rounds() if row["status"] == "accepted" and row["bytes_up"]]
    count = max(1, len(rows))
    return {
        f"bytes_{direction}_per_site_round": round(sum(row[f"bytes_{direction}"] for row in rows) / count)
        for direction in ("up", "down")
    }
