"""Selection of a run's trackers, by its configuration and by the server's environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from fedsigma.common.config.schema import ConfigError
from fedsigma.server.trackers.base import Tracker

__all__ = [
    "STORE_FILES",
    "TRACKERS",
    "TrackerChoice",
    "TrackerError",
    "choose_trackers",
    "merge_choices",
    "open_tracker",
    "parse_trackers",
]

TRACKERS = ("mlflow", "tensorboard", "wandb")
"""Names of the trackers: each is a Python package, and a module here with a class such as `MlflowTracker`."""
STORE_FILES = ("mlflow", "wandb")
"""Trackers that store files of a run."""
# MLflow's default is a database in the working directory of the server process.
_REQUIRED_VARIABLES = {"mlflow": ("MLFLOW_TRACKING_URI", "the address of an MLflow server")}
VARIABLE = "FEDSIGMA_TRACKERS"
_WITH_SHIFT = "+sigma"


class TrackerError(ConfigError):
    """A tracker is unknown, not installed, or not configured."""


@dataclass(frozen=True)
class TrackerChoice:
    """A tracker that was chosen for a run.

    Attributes:
        name: Name in `TRACKERS`.
        with_shift: Whether it stores the shift file as well.
    """

    name: str
    with_shift: bool = False


def parse_trackers(text: str, *, where: str = "trackers") -> tuple[TrackerChoice, ...]:
    """Parse a comma-separated list such as `mlflow+sigma,tensorboard`; `where` is the name of the setting.

    Raises:
        TrackerError: A tracker is unknown, or is given the shift file and stores no files.
    """
    choices = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, with_shift = item.removesuffix(_WITH_SHIFT), item.endswith(_WITH_SHIFT)
        if name not in TRACKERS:
            raise TrackerError(f"{where} is '{item}', expected one of {', '.join(TRACKERS)}")
        if with_shift and name not in STORE_FILES:
            raise TrackerError(f"{where} is '{item}', but {name} stores no files: remove {_WITH_SHIFT}")
        choices.append(TrackerChoice(name, with_shift))
    return merge_choices(choices)


def merge_choices(choices: Iterable[TrackerChoice]) -> tuple[TrackerChoice, ...]:
    """Return one choice for each tracker, with the shift file if any of its choices has it."""
    with_shift: dict[str, bool] = {}
    for choice in choices:
        with_shift[choice.name] = with_shift.get(choice.name, False) or choice.with_shift
    return tuple(TrackerChoice(*item) for item in with_shift.items())


def choose_trackers(text: str) -> tuple[TrackerChoice, ...]:
    """Return the trackers of a run: those of its configuration `text`, and those of $FEDSIGMA_TRACKERS.

    Raises:
        TrackerError: A tracker is unknown, not installed, or not configured.
    """
    configured = parse_trackers(text)
    choices = merge_choices((*parse_trackers(os.environ.get(VARIABLE, ""), where=VARIABLE), *configured))
    for choice in choices:
        _check(choice.name)
    return choices


def open_tracker(name: str) -> Tracker:
    """Create a tracker, which imports its library.

    Raises:
        TrackerError: It is not installed, or not configured.
    """
    _check(name)
    module = import_module(f"fedsigma.server.trackers.{name}")
    return cast(Tracker, getattr(module, f"{name.capitalize()}Tracker")())


def _check(name: str) -> None:
    if find_spec(name) is None:
        raise TrackerError(f"tracker {name} is not installed: pip install 'fedsigma[{name}]'")
    variable, description = _REQUIRED_VARIABLES.get(name, ("", ""))
    if variable and not os.environ.get(variable):
        raise TrackerError(f"tracker {name} needs {variable} in the server's environment: {description}")
