"""Versions of models evaluated at every site, without training: a matrix of version by site."""

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

ZERO = "zero_shot"


def evaluate_versions(
    folder: RunDir, study: StudyConfig, baselines: Baselines, learner: Trainer
) -> dict[str, Any]:
    """Have every site evaluate every version that the study names, and zero-shot where it asks for that.

    Returns:
        The summary: `versions` has an entry a version, as a method of summary.json, with `fairness`.

    Raises:
        ConfigError: a version is not of this study's backbone and layout, or has values at its sites alone.
        ModelError, ArtefactError: there is no such version, or it was changed.
    """
    from fedsigma.common.sigma import Fingerprint

    split = baselines.partition
    shifts = {ZERO: np.zeros(split.shared.size, np.float32)} if ZERO in study.baselines else {}
    for reference in study.evaluate_versions:
        saved = load_shift(find_version(reference, folder.path.parent))
        difference = learner.fingerprint.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json))
        if difference:
            raise ConfigError(f"judge names {reference}, which does not fit this study: {difference}")
        if saved.run:
            raise ConfigError(f"judge names {reference}, a part of which is at the sites that trained it")
        shifts[reference] = split.shared_values(saved.shift.numpy())
    judged = baselines.evaluate(shifts, round=1)
    versions = {name: {**method_entry(sites), "fairness": fairness(sites)} for name, sites in judged.items()}
    for name, entry in versions.items():
        folder.log_event("version_judged", model=name, metrics=entry["metrics"], fairness=entry["fairness"])
    sites = sorted({site for found in judged.values() for site in found})
    if not sites:
        raise ConfigError("no site could evaluate any version")
    return {
        "study": study.name,
        "rounds": 0,
        "sites": sites,
        "classes": list(study.classes),
        "versions": versions,
    }


def fairness(judged: Mapping[str, SiteEvaluation]) -> dict[str, Any]:
    """How evenly a version does over the sites that have test images.

    Returns:
        worst and best, the site and its accuracy; spread, the difference of the two; deviation, the standard
        deviation of the sites' accuracies, each site counting alike. Shares between 0 and 1. Empty if no site
        has test images.
    """
    known = {site: one.evaluation.accuracy for site, one in judged.items() if one.evaluation.test_examples}
    if not known:
        return {}
    worst, best = min(known, key=lambda site: known[site]), max(known, key=lambda site: known[site])
    mean = sum(known.values()) / len(known)
    return {
        "worst": {"site": worst, "accuracy": known[worst]},
        "best": {"site": best, "accuracy": known[best]},
        "spread": known[best] - known[worst],
        "deviation": math.sqrt(sum((value - mean) ** 2 for value in known.values()) / len(known)),
    }


def find_version(reference: str, runs: Path) -> Path:
    """Where a version lies: a file or folder of this name, else the one of the registry beside the runs.

    Raises:
        ModelError: there is no such version.
    """
    place = Path(reference).expanduser()
    return place if place.exists() else ModelRegistry(registry_folder(runs)).find(reference).path
