"""Evaluates versions of models at every site, without training: a matrix of version by site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry import ModelRegistry, registry_folder
from fedsigma.common.registry.shift_file import load_shift
from fedsigma.server.evaluation.baselines import Baselines, method_entry
from fedsigma.server.federation.validation import SiteEvaluation
from fedsigma.server.runs.run_dir import RunDir

if TYPE_CHECKING:
    from fedsigma.common.training.trainer import Trainer

__all__ = ["evaluate_versions", "fairness", "find_version"]

ZERO_SHOT = "zero_shot"


def evaluate_versions(
    run_dir: RunDir, study: StudyConfig, baselines: Baselines, trainer: Trainer
) -> dict[str, Any]:
    """Evaluate the versions that a study names at every site, and zero-shot if it is among the baselines.

    Args:
        run_dir: The run.
        study: The study; `evaluate_versions` names the versions.
        baselines: Evaluates at the sites.
        trainer: Has the fingerprint that the versions must match.

    Returns:
        The summary; `versions` has an entry for each version, like a method of summary.json, with `fairness`.

    Raises:
        ConfigError: A version is of another backbone or layout, or some of its values are at its sites alone.
        ModelError: There is no such version.
        ShiftFileError: A version's file was changed.
    """
    from fedsigma.common.sigma import Fingerprint

    partition = baselines.partition
    shifts = {ZERO_SHOT: np.zeros(partition.shared.size, np.float32)} if ZERO_SHOT in study.baselines else {}
    for reference in study.evaluate_versions:
        saved = load_shift(find_version(reference, run_dir.path.parent))
        named = f"evaluate_versions names {reference}"
        if mismatch := trainer.fingerprint.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json)):
            raise ConfigError(f"{named}, which does not fit this study: {mismatch}")
        if saved.run:
            raise ConfigError(f"{named}, some values of which are at the sites that trained it")
        shifts[reference] = partition.shared_values(saved.shift.numpy())
    evaluations = baselines.evaluate(shifts, round=1)
    versions = {
        name: {**method_entry(by_site), "fairness": fairness(by_site)}
        for name, by_site in evaluations.items()
    }
    for name, entry in versions.items():
        run_dir.log_event(
            "version_evaluated", model=name, metrics=entry["metrics"], fairness=entry["fairness"]
        )
    sites = sorted({site for by_site in evaluations.values() for site in by_site})
    if not sites:
        raise ConfigError("no site could evaluate any version")
    return {
        "study": study.name,
        "rounds": 0,
        "sites": sites,
        "classes": list(study.classes),
        "versions": versions,
    }


def fairness(evaluations: Mapping[str, SiteEvaluation]) -> dict[str, Any]:
    """How evenly a version performs over the sites that have test images.

    Returns:
        `worst` and `best`, the site and its accuracy; `spread`, their difference; `deviation`, the standard
        deviation of the sites' accuracies, each site with the same weight. Shares between 0 and 1. Empty
        without test images.
    """
    accuracies = {
        site: evaluation.evaluation.accuracy
        for site, evaluation in evaluations.items()
        if evaluation.evaluation.test_examples
    }
    if not accuracies:
        return {}
    worst, best = min(accuracies, key=lambda s: accuracies[s]), max(accuracies, key=lambda s: accuracies[s])
    mean = sum(accuracies.values()) / len(accuracies)
    return {
        "worst": {"site": worst, "accuracy": accuracies[worst]},
        "best": {"site": best, "accuracy": accuracies[best]},
        "spread": accuracies[best] - accuracies[worst],
        "deviation": math.sqrt(sum((value - mean) ** 2 for value in accuracies.values()) / len(accuracies)),
    }


def find_version(reference: str, runs: Path) -> Path:
    """The path of a version: a file or folder of this name, else a version of the registry beside the runs.

    Raises:
        ModelError: There is no such version.
    """
    path = Path(reference).expanduser()
    return path if path.exists() else ModelRegistry(registry_folder(runs)).find(reference).path
