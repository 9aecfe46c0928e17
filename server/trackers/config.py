"""Which trackers a run has: named by its configuration and by the server's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

from fedsigma.common.config.schema import ConfigError, did_you_mean
from fedsigma.server.trackers.base import Tracker

__all__ = ["KNOWN", "TrackerChoice", "TrackerError", "choose_trackers", "open_tracker", "parse_trackers"]

VARIABLE = "FEDSIGMA_TRACKERS"
_SIGMA = "+sigma"


class TrackerError(ConfigError):
    """A tracker is not known, not installed, or not set up."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """A tracker that can be had. needs: environment variables that must be set, each with what to give."""

    package: str
    class_name: str
    keeps_files: bool
    needs: Mapping[str, str]


KNOWN = {
    "mlflow": Library(
        package="mlflow",
        class_name="MlflowTracker",
        keeps_files=True,
        # MLflow's own default is a database wherever the server process happens to run.
        needs={"MLFLOW_TRACKING_URI": "the address of an MLflow server"},
    ),
    "tensorboard": Library(
        package="tensorboard", class_name="TensorboardTracker", keeps_files=False, needs={}
    ),
    "wandb": Library(package="wandb", class_name="WandbTracker", keeps_files=True, needs={}),
}


@dataclass(frozen=True)
class TrackerChoice:
    """A tracker by name, and whether it is given the sigma file, too."""

    name: str
    sigma: bool = False


def parse_trackers(text: str, *, where: str = "trackers") -> tuple[TrackerChoice, ...]:
    """Read names with commas between them, as in `mlflow+sigma,tensorboard`.

    Raises:
        TrackerError: a name is not known, or the tracker keeps no files.
    """
    found: dict[str, TrackerChoice] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, sigma = word.removesuffix(_SIGMA), word.endswith(_SIGMA)
        if name not in KNOWN:
            known = f"known are {', '.join(KNOWN)}"
            guess = did_you_mean(name, KNOWN)
            raise TrackerError(
                f"{where} is '{word}', which is not known{guess if known in guess else f'{guess} {known}'}"
            )
        if sigma and not KNOWN[name].keeps_files:
            raise TrackerError(f"{where} is '{word}', and {name} keeps no files: leave {_SIGMA} out")
        found[name] = TrackerChoice(name, sigma or (name in found and found[name].sigma))
    return tuple(found.values())


def choose_trackers(text: str) -> tuple[TrackerChoice, ...]:
    """The trackers of a run: those named in its configuration, and those of $FEDSIGMA_TRACKERS.

    Raises:
        TrackerError: one is not known, not installed, or lacks a setting.
    """
    named = parse_trackers(text)
    always = parse_trackers(os.environ.get(VARIABLE, ""), where=VARIABLE)
    by_name = {one.name: one for one in always}
    for one in named:
        by_name[one.name] = TrackerChoice(one.name, one.sigma or (one in always and one.sigma))
    for name in by_name:
        _check(name)
    return tuple(by_name.values())


def open_tracker(name: str) -> Tracker:
    """Make a tracker, which imports its library.

    Raises:
        TrackerError: it is not installed, or lacks a setting.
    """
    _check(name)
    module = import_module(f"fedsigma.server.trackers.{name}")
    return cast(Tracker, getattr(module, KNOWN[name].class_name)())


def _check(name: str) -> None:
    library = KNOWN[name]
    if find_spec(library.package) is None:
        raise TrackerError(f"tracker {name} is not installed: pip install 'fedsigma[{name}]'")
    for variable, what in library.needs.items():
        if not os.environ.get(variable):
            raise TrackerError(f"tracker {name} needs {variable} in the server's environment: {what}")
