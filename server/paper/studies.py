"""From a cell of a table to the study that trains it: lengths, learning rate, division of the images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedsigma.common.cards import Protocol
from fedsigma.common.config import ConfigError, StudyConfig
from fedsigma.common.reading import build, read_yaml
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.tables import Cell

__all__ = ["read_overrides", "steps_of", "study_of"]

BATCH = 32
"""The paper's batch size, of all its runs."""
# Found on studies of real images (docs/results.md): short rounds and momentum at the server.
FEDERATION = {"strategy": "fedavgm", "options": {"server_learning_rate": 1.0, "server_momentum": 0.8}}
_OF_THE_CELL = ("name", "classes", "data", "shots", "seed", "baselines", "template", "backbone")


def steps_of(protocol: Protocol, *, shots: int, classes: int, batch: int = BATCH) -> int:
    """Optimiser steps of a run: iterations by shots where the protocol counts so, else whole epochs.

    An epoch has as many steps as there are full batches among shots * classes images, and at least one: the
    loader of the published code leaves out a last batch that is not full.
    """
    if protocol.iterations_per_shot is not None:
        return protocol.iterations_per_shot * shots
    return protocol.epochs * max(1, shots * classes // batch)


def study_of(
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
        cell: if its setting is central, all steps are one round's.
        trained_on: the set of the cell.
        backbone: '' for the one of the set's card.
        rounds: wanted; fewer if the run has fewer steps.
        most_steps: a longer run is cut to so many, to try things out.
        overrides: settings by section, as `read_overrides` gives them.

    Raises:
        ConfigError: the settings do not go together.
    """
    half = "base" if cell.protocol == "base_to_novel" else None
    protocol, classes = trained_on.protocol(cell.protocol), trained_on.half(half)
    training = {"learning_rate": protocol.learning_rate, "weight_decay": protocol.weight_decay}
    training |= {"batch_size": BATCH} | dict(overrides.get("training", {}))
    batch = int(training["batch_size"])
    steps = steps_of(protocol, shots=max(1, cell.shots), classes=len(classes), batch=batch)
    steps = min(steps, most_steps)
    apart = cell.setting is not None and cell.setting.way != "central"
    local_steps = int(training.setdefault("local_steps", math.ceil(steps / rounds) if apart else steps))
    federation: dict[str, Any] = {**FEDERATION, "min_sites": 1, "wait_for_sites_s": 0}
    # Sites have no test images: the finished model is judged on the whole test part.
    federation |= {"rounds": max(1, round(steps / local_steps)), "evaluate_every": 100_000}
    federation |= {"participation": cell.setting.participation} if cell.setting else {}
    given = dict(overrides.get("federation", {}))
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
        ConfigError: it is not of that form, or names what the table itself decides.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        place, equals, text = setting.partition("=")
        section, dot, key = place.strip().partition(".")
        if not equals or not section or (dot and not key):
            raise ConfigError(f"--set is '{setting}', expected SECTION.KEY=VALUE as federation.codec=small")
        if section in _OF_THE_CELL or place.strip() == "federation.participation":
            raise ConfigError(f"--set names '{place}', which the table decides: leave it out")
        value = read_yaml(f"value: {text}", where=f"--set {place}")["value"]
        if dot:
            found.setdefault(section, {})[key] = value
        else:
            found[section] = value
    return found
