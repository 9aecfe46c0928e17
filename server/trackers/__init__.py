"""Experiment trackers: MLflow, TensorBoard and Weights & Biases are told what a run writes, if asked for."""

from fedsigma.server.trackers.base import TrackedRun, Tracker
from fedsigma.server.trackers.callback import Tracking
from fedsigma.server.trackers.config import TrackerChoice, TrackerError, choose_trackers, parse_trackers

__all__ = [
    "TrackedRun",
    "Tracker",
    "TrackerChoice",
    "TrackerError",
    "Tracking",
    "choose_trackers",
    "parse_trackers",
]
