"""Build the study that trains a cell of a table: length, learning rate, division of the images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fedsigma.common.config.federation import FederationConfig
from fedsigma.common.config.schema import ConfigError, build, did_you_mean, flatten, read_yaml
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.data.catalog.card import Protocol
from fedsigma.server.paper import MAX_ROUNDS, NO_STEP_LIMIT
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell

__all__ = ["CellSettings", "build_study", "count_steps", "read_overrides"]

BATCH_SIZE = 32
"""The paper's batch size, of all its runs."""
# Chosen on studies of real images (docs/research/accuracy.md): short rounds and momentum at the server.
FEDERATION = {"strategy": "fedavgm", "options": {"server_learning_rate": 1.0, "server_momentum": 0.8}}
# The table decides these, or its cells cannot have them: a personal part has no test images.
_NOT_OVERRIDABLE = {
    *("name", "classes", "data", "shots", "seed", "baselines", "template", "backbone"),
    *("evaluate_versions", "personal", "federation.participation", "federation.rounds"),
}
_SECTIONS = {"training": LocalTrainingConfig, "federation": FederationConfig}


def count_steps(protocol: Protocol, *, shots: int, classes: int, batch_size: int = BATCH_SIZE) -> int:
    """Return the optimiser steps of a run: the protocol's iterations per shot, or whole epochs.

    An epoch has a step for each full batch among shots * classes images, and at least one: the loader of the
    published code drops the last batch if it is not full.
    """
    if protocol.iterations_per_shot is not None:
        return protocol.iterations_per_shot * shots
    return protocol.epochs * max(1, shots * classes // batch_size)


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """Settings that all cells of a call share.

    Attributes:
        backbone: Backbone of the studies; empty for that of each set's card.
        rounds: Greatest number of rounds of a federated run.
        max_steps: Greatest number of optimiser steps of a site, to try things out.
        overrides: Settings by section, from `read_overrides`. Those that a cell does not use leave it
            unchanged: all of them without training, those of the federation in one place.
    """

    backbone: str = ""
    rounds: int = MAX_ROUNDS
    max_steps: int = NO_STEP_LIMIT
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def describe_changes(self) -> list[str]:
        """Describe each difference from the table's own settings."""
        changes = [f"{name} = {value}" for name, value in flatten(self.overrides)]
        if self.rounds != MAX_ROUNDS:
            changes.append(f"at most {self.rounds:,} rounds")
        if self.max_steps != NO_STEP_LIMIT:
            changes.append(f"at most {self.max_steps:,} steps a site")
        return changes


def build_study(cell: Cell, trained_on: PublishedSet, settings: CellSettings) -> StudyConfig:
    """Return the study of a cell.

    Its rounds and local steps together are the steps of the central run, as nearly as whole rounds allow. A
    central run has all steps in one round.

    Args:
        cell: The cell.
        trained_on: Set of the cell.
        settings: Settings of all cells.

    Raises:
        ConfigError: The settings are incompatible.
    """
    setting, half = cell.setting, cell.training_half
    protocol, shots = trained_on.protocol(cell.protocol), max(1, cell.shots)
    overrides = settings.overrides if setting else {}
    training: dict[str, Any] = {
        "learning_rate": protocol.learning_rate,
        "weight_decay": protocol.weight_decay,
        "batch_size": BATCH_SIZE,
        **overrides.get("training", {}),
    }
    batch_size = build(LocalTrainingConfig, training, where=str(cell)).batch_size
    classes = trained_on.half(half)
    steps = count_steps(protocol, shots=shots, classes=len(classes), batch_size=batch_size)
    steps = min(steps, settings.max_steps) if setting else 1
    divided = setting is not None and setting.division != "central"
    local_steps = training.setdefault("local_steps", math.ceil(steps / settings.rounds) if divided else steps)
    # Sites have no test images: the final model is evaluated on the whole test part.
    federation: dict[str, Any] = {
        **FEDERATION,
        "min_sites": 1,
        "wait_for_sites_s": 0,
        "rounds": max(1, round(steps / local_steps)),
        "evaluate_every": 100_000,
    }
    if setting is not None:
        federation["participation"] = setting.participation
    if setting is not None and divided and not setting.pooled:
        changes = overrides.get("federation", {})
        if "strategy" in changes:
            del federation["options"]
        federation |= changes
    content: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", f"{trained_on.name}-{cell.protocol}-{cell.row}")[:80],
        "backbone": settings.backbone or trained_on.backbone,
        "classes": list(classes),
        "template": trained_on.template,
        "shots": shots,
        "training": training,
        "federation": federation,
        "baselines": [],
        "seed": cell.seed,
    }
    content |= {name: value for name, value in overrides.items() if name not in _SECTIONS}
    if setting is not None and divided:
        options = trained_on.options | {"parts": ["train"]} | ({"half": half} if half else {})
        content["data"] = {"source": trained_on.source, "sites_by": setting.sites_by, "options": options}
    return build(StudyConfig, content, where=str(cell))


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse `SECTION.KEY=VALUE` with YAML values into nested settings.

    Raises:
        ConfigError: An argument is not of this form, or names a setting that is unknown or the table's.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not section or (dot and not key):
            raise ConfigError(f"--set is '{argument}', expected SECTION.KEY=VALUE as federation.codec=small")
        value = read_yaml(f"value: {text}", where=f"--set {name}")["value"]
        content = {key: value} if dot else value
        if section in _SECTIONS and not isinstance(content, dict):
            raise ConfigError(f"--set {section} is {value!r}, expected {section}.KEY=VALUE")
        if isinstance(content, dict):
            _check_names(section, list(map(str, content)))
            content = {**overrides.get(section, {}), **content}
        else:
            _check_names(section, [])
        overrides[section] = content
    return overrides


def _check_names(section: str, keys: Sequence[str]) -> None:
    """Refuse settings that the table decides, and unknown keys of a section that not all cells use."""
    for name in (section, *(f"{section}.{key}" for key in keys)):
        if name in _NOT_OVERRIDABLE:
            hint = "see --rounds" if name == "federation.rounds" else "leave it out"
            raise ConfigError(f"--set names '{name}', which the table decides: {hint}")
    if section in _SECTIONS:
        setting_names = [f.name for f in fields(_SECTIONS[section])]
        if unknown := [key for key in keys if key not in setting_names]:
            raise ConfigError(
                f"--set names '{section}.{unknown[0]}', which is unknown"
                f"{did_you_mean(unknown[0], setting_names)}"
            )
