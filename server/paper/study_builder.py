"""From a cell of a table to the study that trains it: lengths, learning rate, division of the images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedsigma.common.config.federation import FederationConfig
from fedsigma.common.config.schema import ConfigError, build, did_you_mean, read_yaml
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.data.catalog import Protocol
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell

__all__ = ["build_study", "count_steps", "read_overrides"]

BATCH = 32
"""The paper's batch size, of all its runs."""
# Found on studies of real images (docs/research/accuracy.md): short rounds and momentum at the server.
FEDERATION = {"strategy": "fedavgm", "options": {"server_learning_rate": 1.0, "server_momentum": 0.8}}
# What the table decides, or what its cells cannot have: a personal part has no test images to be judged on.
_NOT_GIVEN = (
    *(
        "name",
        "classes",
        "data",
        "shots",
        "seed",
        "baselines",
        "template",
        "backbone",
        "evaluate_versions",
        "personal",
    ),
    *("federation.participation", "federation.rounds"),
)
_SECTIONS = {"training": LocalTrainingConfig, "federation": FederationConfig}


def count_steps(protocol: Protocol, *, shots: int, classes: int, batch: int = BATCH) -> int:
    """Optimiser steps of a run: iterations by shots where the protocol counts so, else whole epochs.

    An epoch has as many steps as there are full batches among shots * classes images, and at least one: the
    loader of the published code leaves out a last batch that is not full.
    """
    if protocol.iterations_per_shot is not None:
        return protocol.iterations_per_shot * shots
    return protocol.epochs * max(1, shots * classes // batch)


def build_study(
    cell: Cell,
    trained_on: PublishedSet,
    *,
    backbone: str,
    rounds: int,
    most_steps: int,
    overrides: Mapping[str, Any],
) -> StudyConfig:
    """The study of a cell. Its rounds and local steps together are the steps of the central run, as nearly as
    whole rounds can be.

    Args:
        cell: If its setting is central, all steps are one round's.
        trained_on: The set of the cell.
        backbone: '' for the one of the set's card.
        rounds: Wanted; fewer if the run has fewer steps.
        most_steps: A longer run is cut to so many, to try things out.
        overrides: Settings by section, as `read_overrides` gives them. What a cell has no use for changes
            nothing in it: No setting the model without training, none of the federation those in one place.

    Raises:
        ConfigError: The settings do not go together.
    """
    half = "base" if cell.protocol == "base_to_novel" else None
    protocol, classes = trained_on.protocol(cell.protocol), trained_on.half(half)
    apart = cell.setting is not None and cell.setting.way != "central"
    overrides = overrides if cell.setting else {}
    training: dict[str, Any] = {
        "learning_rate": protocol.learning_rate,
        "weight_decay": protocol.weight_decay,
        "batch_size": BATCH,
        **overrides.get("training", {}),
    }
    batch = build(LocalTrainingConfig, training, where=str(cell)).batch_size
    steps = count_steps(protocol, shots=max(1, cell.shots), classes=len(classes), batch=batch)
    steps = min(steps, most_steps) if cell.setting else 1
    local_steps = training.setdefault("local_steps", math.ceil(steps / rounds) if apart else steps)
    federation: dict[str, Any] = {**FEDERATION, "min_sites": 1, "wait_for_sites_s": 0}
    # Sites have no test images: the finished model is judged on the whole test part.
    federation |= {"rounds": max(1, round(steps / local_steps)), "evaluate_every": 100_000}
    federation |= {"participation": cell.setting.participation} if cell.setting else {}
    averaged = cell.setting is not None and apart and not cell.setting.pooled
    given = dict(overrides.get("federation", {})) if averaged else {}
    if "strategy" in given:
        federation.pop("options")
    content: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", f"{trained_on.name}-{cell.protocol}-{cell.row}")[:80],
        "backbone": backbone or trained_on.backbone,
        "classes": list(classes),
        "template": trained_on.template,
        "shots": max(1, cell.shots),
        "training": training,
        "federation": federation | given,
        "baselines": [],
        "seed": cell.seed,
    }
    content |= {name: value for name, value in overrides.items() if name not in ("training", "federation")}
    if cell.setting is not None and apart:
        options = trained_on.options | {"parts": ["train"]} | ({"half": half} if half else {})
        content["data"] = {
            "source": trained_on.source,
            "sites_by": cell.setting.sites_by,
            "options": options,
        }
    return build(StudyConfig, content, where=str(cell))


def read_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Read `section.key=value`, the value as YAML, into nested settings.

    Raises:
        ConfigError: It is not of that form, or names what the table itself decides.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        section, dot, key = place.strip().partition(".")
        if not equals or not section or (dot and not key):
            raise ConfigError(f"--set is '{setting}', expected SECTION.KEY=VALUE as federation.codec=small")
        value = read_yaml(f"value: {text}", where=f"--set {place}")["value"]
        given = {key: value} if dot else value
        if section in _SECTIONS and not isinstance(given, dict):
            raise ConfigError(f"--set {section} is {value!r}, expected {section}.KEY=VALUE")
        _check_names(section, list(map(str, given)) if isinstance(given, dict) else [])
        found[section] = {**found.get(section, {}), **given} if isinstance(given, dict) else given
    return found


def _check_names(section: str, keys: Sequence[str]) -> None:
    """Refuse what the table itself decides, and what is no setting of a section that not all cells have."""
    for name in (section, *(f"{section}.{key}" for key in keys)):
        if name in _NOT_GIVEN:
            hint = "see --rounds" if name == "federation.rounds" else "leave it out"
            raise ConfigError(f"--set names '{name}', which the table decides: {hint}")
    if section in _SECTIONS:
        known = [field.name for field in fields(_SECTIONS[section])]
        for key in keys:
            if key not in known:
                raise ConfigError(
                    f"--set names '{section}.{key}', which is not known{did_you_mean(key, known)}"
                )
