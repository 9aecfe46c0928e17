"""Publish the model of a finished run as a version of the registry."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.manifest import Manifest, SiteRow, method_rows
from fedsigma.common.registry.model_card import write_card
from fedsigma.common.registry.shift_file import SavedShift, load_shift
from fedsigma.common.registry.store import ModelRegistry, Version

__all__ = ["add_version", "draft_manifest", "publish"]


def publish(
    registry: ModelRegistry,
    run: Path,
    summary: Mapping[str, Any],
    *,
    named: Collection[str],
    private: str = "",
) -> Version:
    """Make a version of a run's model.

    Args:
        registry: Registry to add the version to.
        run: Folder of the run.
        summary: Results of the run.
        named: Sites that the manifest may name.
        private: Statement of the differential privacy guarantee; empty without one.

    Raises:
        ShiftFileError: The run has no model, or it is damaged.
        ModelError: The study's name cannot be a model's name.
    """
    saved = load_shift(run)
    per_site = summary.get("federated", {}).get("per_site", {})
    # By accuracy, so that the order does not reveal the sites without a name.
    order = sorted(summary.get("sites", []), key=lambda site: per_site.get(site, math.inf))
    sites = tuple(SiteRow(name=s if s in named else "", accuracy=per_site.get(s)) for s in order)
    draft = replace(draft_manifest(saved, origin="trained"), results=method_rows(summary), sites=sites)
    return add_version(
        registry, draft, (run / "sigma.safetensors").read_bytes(), saved.study_yaml, private=private
    )


def draft_manifest(saved: SavedShift, *, origin: str) -> Manifest:
    """Return the manifest of a shift, without results and sites."""
    study = StudyConfig.from_yaml(saved.study_yaml, where="the shift's study")
    fingerprint = json.loads(saved.fingerprint_json)
    return Manifest(
        name=study.name,
        version=0,
        created="",
        origin=origin,
        backbone=study.backbone,
        weights=str(fingerprint.get("weights", "")),
        layout=str(fingerprint.get("layout", "")),
        study=hashlib.sha256(saved.study_yaml.encode()).hexdigest(),
        classes=study.classes,
        rounds=saved.round,
    )


def add_version(
    registry: ModelRegistry, draft: Manifest, sigma: bytes, study_yaml: str, *, private: str = ""
) -> Version:
    """Add a version with its shift, study and model card to the registry."""
    files = {
        "sigma.safetensors": sigma,
        "study.yaml": study_yaml.encode(),
        "card.md": write_card(draft, study=study_yaml, private=private).encode(),
    }
    return registry.add(draft, files)
