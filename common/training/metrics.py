"""Classification metrics, computed by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from fedsigma.common.config.constants import METRICS
from fedsigma.common.utils.errors import InputError

ECE_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """Predictions and labels of n images.

    Attributes:
        probabilities: class probabilities, shape (n, classes).
        labels: true class numbers, shape (n,).

    Raises:
        InputError: the shapes do not match, or a label is outside the classes.
    """

    probabilities: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.probabilities.ndim != 2 or self.labels.shape != self.probabilities.shape[:1]:
            raise InputError(
                f"probabilities {tuple(self.probabilities.shape)} and labels {tuple(self.labels.shape)} "
                "do not fit: expected (n, classes) and (n,)"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.class_count:
            raise InputError(f"a label is outside 0..{self.class_count - 1}")

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return self.probabilities.shape[1]

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Concatenate the predictions of several sites."""
        return Predictions(torch.cat([p.probabilities for p in parts]), torch.cat([p.labels for p in parts]))


@dataclass(frozen=True)
class ClassificationMetrics:
    """Metrics of one set of images, over the classes that occur; an undefined metric is None.

    Attributes:
        examples: number of images.
        accuracy: fraction of correct predictions.
        balanced_accuracy: mean recall.
        auroc: macro, one class against the rest; it needs two classes.
        f1: macro.
        ece: expected calibration error of the largest probability, in 15 bins.
        confusion: counts by true class (rows) and predicted class (columns), shape (classes, classes).
    """

    examples: int
    accuracy: float | None
    balanced_accuracy: float | None
    auroc: float | None
    f1: float | None
    ece: float | None
    confusion: Tensor

    def to_dict(self) -> dict[str, float]:
        """The defined metrics by name, and `examples`."""
        defined = {name: value for name in METRICS if (value := getattr(self, name)) is not None}
        return {**defined, "examples": float(self.examples)}


def _mean(values: Tensor) -> float | None:
    mean = float(values.mean())
    return None if math.isnan(mean) else mean


def compute_metrics(predictions: Predictions) -> ClassificationMetrics:
    """Compute all metrics of a set of predictions."""
    p, y, k = predictions.probabilities.float(), predictions.labels, predictions.class_count
    if not len(y):
        return ClassificationMetrics(0, None, None, None, None, None, torch.zeros(k, k, dtype=torch.long))
    if k == 1:
        return ClassificationMetrics(
            len(y), 1.0, 1.0, None, 1.0, float(1 - p.mean()), torch.tensor([[len(y)]])
        )
    confusion = multiclass_confusion_matrix(p, y, k)
    present = confusion.sum(1) > 0
    recall = multiclass_accuracy(p, y, k, average=None)
    f1 = multiclass_f1_score(p, y, k, average=None)
    # A class that never occurs, or the only one that does, has no curve.
    auroc = None
    if int(present.sum()) > 1:
        curves = [
            multiclass_auroc(torch.stack([1 - p[:, c], p[:, c]], 1), (y == c).long(), 2, average=None)[1]
            for c in present.nonzero().flatten().tolist()
        ]
        auroc = float(torch.stack(curves).mean())
    return ClassificationMetrics(
        examples=len(y),
        accuracy=float((p.argmax(1) == y).float().mean()),
        balanced_accuracy=_mean(recall[present]),
        auroc=auroc,
        f1=_mean(f1[present]),
        ece=float(multiclass_calibration_error(p, y, k, n_bins=ECE_BINS, norm="l1")),
        confusion=confusion,
    )
