"""Optional experiment trackers: MLflow, TensorBoard, and Weights & Biases."""

from fedsigma.server.trackers.callback import TrackerCallback
from fedsigma.server.trackers.config import TrackerChoice, TrackerError, choose_trackers, parse_trackers

__all__ = ["TrackerCallback", "TrackerChoice", "TrackerError", "choose_trackers", "parse_trackers"]
