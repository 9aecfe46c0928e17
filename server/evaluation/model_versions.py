"""Evaluates versions of models at every site, without training: a matrix of version by site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.registry import ModelRegistry, registry_folder
from fedsigma.common.registry.shift_file import load_shift
from fedsigma.common.sigma import Fingerprint
from fedsigma.server.evaluation.baselines import evaluate_shifts, method_entry
from fedsigma.server.federation.federation import Federation
from fedsigma.server.federation.validation import SiteEvaluation

__all__ = ["evaluate_versions", "fairness", "find_version"]


def evaluate_versions(federation: Federation) -> dict[str, Any]:
    """Evaluate the versions that the study names at every site, and zero-shot if it is among the baselines.

    Returns:
        The summary; `versions` has an entry for each version, like a method of summary.json, with `fairness`.

    Raises:
        ConfigError: A version is of another backbone or layout, or some of its values are at its sites alone.
        ModelError: There is no such version.
        ShiftFileError: A version's file was changed.
    """
    study, run_dir = federation.study, federation.run_dir
    shifts = {}
    if "zero_shot" in study.baselines:
        shifts["zero_shot"] = np.zeros(federation.layout.size, np.float32)
    for reference in study.evaluate_versions:
        saved = load_shift(find_version(reference, run_dir.path.parent))
        fingerprint = Fingerprint.from_json(saved.fingerprint_json)
        if mismatch := federation.fingerprint.describe_mismatch(fingerprint):
            raise ConfigError(
                f"evaluate_versions names {reference}, which does not fit this study: {mismatch}"
            )
        if saved.run:
            raise ConfigError(
                f"evaluate_versions names {reference}, some values of which are at the sites that trained it"
            )
        shifts[reference] = federation.partition.shared_values(saved.shift.numpy())
    evaluations = evaluate_shifts(federation, shifts, round=1)
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
    accuracies = {site: result.accuracy for site, result in evaluations.items() if result.test_examples}
    if not accuracies:
        return {}
    worst, best = (pick(accuracies, key=lambda site: accuracies[site]) for pick in (min, max))
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
