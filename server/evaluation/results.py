"""The results of a study: the final model and the baselines, evaluated at the sites, as summary.json has
them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.trainer import Trainer
from fedsigma.common.wire.records import Evaluation
from fedsigma.server.evaluation.baselines import Baselines, method_entry
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.federation.validation import SiteEvaluation
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["evaluate_study", "write_summary"]

Vector = NDArray[np.float32]


def evaluate_study(
    run_dir: RunDir,
    study: StudyConfig,
    baselines: Baselines,
    trainer: Trainer,
    shift: Vector,
    started: float,
) -> dict[str, Any]:
    """Evaluate the final model and compute the study's baselines; the summary is written after each of them.

    Args:
        run_dir: The run.
        study: The study.
        baselines: Evaluates at the sites.
        trainer: Trains the pooled baseline.
        shift: The final global shift, shape (shared values,).
        started: When the run started, by `time.monotonic`.

    Returns:
        The summary, as docs/run-folder.md describes it.

    Raises:
        NoModel: No site could evaluate the final model.
    """
    last = study.federation.rounds + 1
    partition = trainer.partition(study.personal)
    shifts, evaluated = {"shared_only": shift}, {}
    if "zero_shot" in study.baselines:
        evaluated["zero_shot"] = _first_round(run_dir)
        if set(baselines.site_manager.available().values()) - set(evaluated["zero_shot"]):
            # A site failed in the first round; evaluating at all sites again needs no further message.
            shifts["zero_shot"] = np.zeros(partition.shared.size, np.float32)
    # A site uses the shared values with its own; without personal values the two models are the same.
    if not partition.personal_size:
        evaluated |= baselines.evaluate(shifts, round=last)
        evaluated["federated"] = evaluated.pop("shared_only")
    else:
        evaluated |= baselines.evaluate({"federated": shift}, round=last, personal=True)
        evaluated |= baselines.evaluate(shifts, round=last)
    if not evaluated["federated"]:
        raise NoModel("no site could evaluate the final model")
    for site, evaluation in evaluated["federated"].items():
        run_dir.log_round(last, site, evaluation.evaluation.metrics(), 0, 0, "accepted")
    federated = method_entry(evaluated["federated"])
    run_dir.log_round(last, ALL_SITES, federated["metrics"], 0, 0, ALL_SITES)

    summary: dict[str, Any] = {"study": study.name, "rounds": study.federation.rounds}
    summary |= {
        "sites": sorted(evaluated["federated"]),
        "classes": list(study.classes),
        **_bytes_per_round(run_dir),
    }
    if "zero_shot" in evaluated:
        summary["zero_shot"] = method_entry(evaluated["zero_shot"])
        metrics = summary["zero_shot"]["metrics"]
        run_dir.log_event("baseline", method="zero_shot", site=ALL_SITES, metrics=metrics)
    summary["federated"] = federated
    if "shared_only" in evaluated:
        summary["shared_only"] = method_entry(evaluated["shared_only"])
    methods = {
        "local_only": baselines.local_only,
        "pooled": lambda: baselines.pooled(trainer),
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
            evaluations[row["site"]] = SiteEvaluation(evaluation=evaluation)
    return evaluations


def _bytes_per_round(run_dir: RunDir) -> dict[str, int]:
    """Bytes of one site's exchange in one round, each way: the mean over accepted replies."""
    rows = [row for row in run_dir.rounds() if row["status"] == "accepted" and row["bytes_up"]]
    count = max(1, len(rows))
    return {
        f"bytes_{direction}_per_site_round": round(sum(row[f"bytes_{direction}"] for row in rows) / count)
        for direction in ("up", "down")
    }
