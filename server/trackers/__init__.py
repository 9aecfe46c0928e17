"""Experiment trackers: MLflow, TensorBoard and Weights & Biases are told what a run writes, if asked for."""

from fedsigma.server.trackers.base import TrackedRun, Tracker
from fedsigma.server.trackers.choice import Choice, TrackerError, choose_trackers, parse_trackers
from fedsigma.server.trackers.tracking import Tracking

__all__ = [
    "Choice",
    "TrackedRun",
    "Tracker",
    "TrackerError",
    "Tracking",
    "choose_trackers",
    "parse_trackers",
]
