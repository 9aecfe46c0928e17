"""Selection of a run's trackers, by its configuration and by the server's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from fedsigma.common.config.schema import ConfigError, did_you_mean
from fedsigma.server.trackers.base import Tracker

__all__ = ["TRACKERS", "TrackerChoice", "TrackerError", "choose_trackers", "open_tracker", "parse_trackers"]

VARIABLE = "FEDSIGMA_TRACKERS"
_WITH_SHIFT = "+sigma"


class TrackerError(ConfigError):
    """A tracker is unknown, not installed, or not configured."""


@dataclass(frozen=True, kw_only=True)
class TrackerSpec:
    """A supported tracker.

    Attributes:
        package: Python package that must be installed.
        class_name: Class in `fedsigma.server.trackers.NAME`.
        stores_files: Whether it stores files of the run.
        environment: Required environment variables, each with a description of its value.
    """

    package: str
    class_name: str
    stores_files: bool
    environment: Mapping[str, str]


TRACKERS = {
    "mlflow": TrackerSpec(
        package="mlflow",
        class_name="MlflowTracker",
        stores_files=True,
        # MLflow's default is a database in the working directory of the server process.
        environment={"MLFLOW_TRACKING_URI": "the address of an MLflow server"},
    ),
    "tensorboard": TrackerSpec(
        package="tensorboard", class_name="TensorboardTracker", stores_files=False, environment={}
    ),
    "wandb": TrackerSpec(package="wandb", class_name="WandbTracker", stores_files=True, environment={}),
}


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
    """Parse a comma-separated list such as `mlflow+sigma,tensorboard`.

    Args:
        text: The list.
        where: Name of the setting, for messages.

    Raises:
        TrackerError: A tracker is unknown, or is given the shift file and stores no files.
    """
    choices: dict[str, TrackerChoice] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, with_shift = item.removesuffix(_WITH_SHIFT), item.endswith(_WITH_SHIFT)
        if name not in TRACKERS:
            known = f"known are {', '.join(TRACKERS)}"
            guess = did_you_mean(name, TRACKERS)
            raise TrackerError(
                f"{where} is '{item}', which is not known{guess if known in guess else f'{guess} {known}'}"
            )
        if with_shift and not TRACKERS[name].stores_files:
            raise TrackerError(f"{where} is '{item}', but {name} stores no files: remove {_WITH_SHIFT}")
        choices[name] = TrackerChoice(name, with_shift or (name in choices and choices[name].with_shift))
    return tuple(choices.values())


def choose_trackers(text: str) -> tuple[TrackerChoice, ...]:
    """Return the trackers of a run: those of its configuration, and those of $FEDSIGMA_TRACKERS.

    Args:
        text: The list in the run's configuration.

    Raises:
        TrackerError: A tracker is unknown, not installed, or not configured.
    """
    configured = parse_trackers(text)
    from_environment = parse_trackers(os.environ.get(VARIABLE, ""), where=VARIABLE)
    by_name = {choice.name: choice for choice in from_environment}
    for choice in configured:
        with_shift = choice.with_shift or (choice.name in by_name and by_name[choice.name].with_shift)
        by_name[choice.name] = TrackerChoice(choice.name, with_shift)
    for name in by_name:
        _check(name)
    return tuple(by_name.values())


def open_tracker(name: str) -> Tracker:
    """Create a tracker, which imports its library.

    Args:
        name: Name in `TRACKERS`.

    Raises:
        TrackerError: It is not installed, or not configured.
    """
    _check(name)
    module = import_module(f"fedsigma.server.trackers.{name}")
    return cast(Tracker, getattr(module, TRACKERS[name].class_name)())


def _check(name: str) -> None:
    spec = TRACKERS[name]
    if find_spec(spec.package) is None:
        raise TrackerError(f"tracker {name} is not installed: pip install 'fedsigma[{name}]'")
    for variable, description in spec.environment.items():
        if not os.environ.get(variable):
            raise TrackerError(f"tracker {name} needs {variable} in the server's environment: {description}")
