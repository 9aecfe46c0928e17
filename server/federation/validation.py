"""Validation of the sites' replies, and metrics over all sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.constants import METRICS
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.wire.codec import CodecError, decode
from fedsigma.common.wire.records import (
    EvaluateReply,
    Evaluation,
    ProtocolError,
    TrainReply,
    TrainTask,
    from_record,
)
from fedsigma.server.federation.messenger import SiteReply

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = [
    "InvalidReply",
    "SiteEvaluation",
    "SiteUpdate",
    "aggregate_metrics",
    "aggregation_weight",
    "check_norm",
    "dot",
    "l2_norm",
    "metrics_of_confusion",
    "reject_norm_outliers",
    "validate_evaluations",
    "validate_update",
]

_PIECE = 16_384


class InvalidReply(FedSigmaError, ValueError):
    """A reply is rejected; the text says why, in one sentence."""


@dataclass(kw_only=True)
class SiteUpdate:
    """One site's part in a round; the update, which is most of it, is kept elsewhere.

    Attributes:
        site: Name of the site.
        reply: The site's reply, without its record.
        training: What the site reports of its training, with an empty update; None unless it is valid.
        masked: Whether it is part of a masked sum.
        rejection: Why the reply is rejected; empty if it is not.
        update_norm: L2 norm of the update.
        shift_norm: L2 norm of the global shift plus the update.
    """

    site: str
    reply: SiteReply
    training: TrainReply | None = None
    masked: bool = False
    rejection: str = ""
    update_norm: float = 0.0
    shift_norm: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The scalars of an accepted update, by the columns of rounds.csv."""
        assert self.training is not None
        metrics = {**self.training.evaluation.metrics(), "examples": self.training.examples}
        if math.isnan(self.training.loss):  # not reported: training is private
            return metrics | {"epsilon": self.training.epsilon}
        return metrics | {"loss": self.training.loss}


@dataclass(frozen=True, kw_only=True)
class SiteEvaluation(Evaluation):
    """The evaluation of one shift at one site.

    Attributes:
        confusion: Test images by true class, then by predicted class, row by row; empty unless the site's
            policy shares it.
    """

    confusion: tuple[int, ...] = ()


def validate_evaluations(content: Any, *, shifts: int, classes: int) -> list[SiteEvaluation]:
    """Validate the reply to an `EvaluateTask`.

    Args:
        content: The reply's record.
        shifts: Number of shifts in the task.
        classes: Number of classes of the study.

    Returns:
        One evaluation for each shift, in the task's order.

    Raises:
        InvalidReply: Its form is invalid, or its counts contradict each other.
    """
    try:
        reply = from_record(EvaluateReply, content)
    except ProtocolError as error:
        raise InvalidReply(str(error)) from error
    counts, size = reply.confusions, classes * classes
    if len(reply.evaluations) != shifts:
        raise InvalidReply(f"{len(reply.evaluations)} evaluations for {shifts} shifts")
    if len(counts) not in (0, shifts * size):
        raise InvalidReply(f"{len(counts)} counts for {shifts} confusion matrices of {classes} classes")
    evaluations = []
    for number, evaluation in enumerate(reply.evaluations):
        matrix = counts[number * size : (number + 1) * size]
        if matrix and sum(matrix) != evaluation.test_examples:
            raise InvalidReply(
                f"a confusion matrix counts {sum(matrix)} of {evaluation.test_examples} test images"
            )
        evaluations.append(SiteEvaluation(**vars(evaluation), confusion=matrix))
    return evaluations


def validate_update(
    content: Any, task: TrainTask, *, study: StudyConfig, layout: Layout, start: NDArray[np.float32]
) -> tuple[TrainReply, NDArray[np.float32], float]:
    """Validate a training reply against its task and study.

    Args:
        content: The reply's record.
        task: The task.
        study: The study, with its bounds.
        layout: The layout of the shared values.
        start: The global shift that the site started from, shape (layout.size,).

    Returns:
        The reply with an empty update; the update, shape (layout.size,), float32; and the L2 norm of `start`
        plus the update.

    Raises:
        InvalidReply: Its form, layout digest, length, type, finiteness, norm or number of examples is
            invalid.
    """
    try:
        reply = from_record(TrainReply, content)
        update = decode(reply.update, layout, level=task.codec)
    except (ProtocolError, CodecError) as error:
        raise InvalidReply(str(error)) from error
    # The update is added to the shift itself, not to its coded form, from which the sites start: what coding
    # lost of that form must not enter the model. Under site-level privacy updates are clipped, not rejected.
    bound = None if study.privacy.of_sites else study.federation.norm_bound
    shift_norm = check_norm(l2_norm(start, update), bound)
    if reply.examples > study.max_examples_per_site:
        raise InvalidReply(
            f"{reply.examples} training images are claimed, {study.shots} shots of {len(study.classes)}"
            f" classes allow {study.max_examples_per_site}"
        )
    if math.isnan(reply.loss) != study.privacy.in_training:
        raise InvalidReply(
            "the loss is not a number"
            if math.isnan(reply.loss)
            else "the loss is reported, which private training never does: the site does not add noise"
        )
    if reply.steps > task.steps:
        raise InvalidReply(f"{reply.steps} steps were trained, the task asked for {task.steps}")
    if len(reply.class_counts) not in (0, len(study.classes)):
        raise InvalidReply(f"{len(reply.class_counts)} class counts for {len(study.classes)} classes")
    return replace(reply, update=b""), update, shift_norm


def aggregation_weight(examples: int, study: StudyConfig) -> int:
    """The weight of a site with this many training images: the images, up to federation.max_examples."""
    return min(examples, study.federation.max_examples or examples)


def dot(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The inner product of two vectors, shape (values,) each, in float64.

    Not by `@`: BLAS starts threads, which for so few values on a busy machine takes a hundred times as long,
    and its last bit depends on their number. In pieces, since allocating large arrays costs more than the
    products.
    """
    total = 0.0
    for part in _pieces(a.size):
        total += float(np.einsum("i,i->", a[part].astype(np.float64), b[part].astype(np.float64)))
    return total


def l2_norm(*vectors: NDArray[np.floating]) -> float:
    """The L2 norm of a vector, or of the sum of several, shape (values,) each; in float64, see `dot`."""
    total = 0.0
    for part in _pieces(vectors[0].size):
        summed = vectors[0][part].astype(np.float64)
        for other in vectors[1:]:
            summed += other[part]
        total += float(np.einsum("i,i->", summed, summed))
    return math.sqrt(total)


def _pieces(values: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, values, _PIECE))


def check_norm(norm: float, bound: float | None) -> float:
    """Return the norm of a shift.

    Raises:
        InvalidReply: The norm is above the bound, if there is one.
    """
    if bound is not None and norm > bound:
        raise InvalidReply(f"the shift's norm {norm:.4g} is above the bound {bound:g}")
    return norm


def reject_norm_outliers(updates: Iterable[SiteUpdate], factor: float) -> None:
    """Reject updates whose norms are out of proportion to the others'.

    All sites train the same number of steps with the same settings, so honest updates have similar norms
    whatever the images, and a mean has no defence of its own against a much longer one.

    Args:
        updates: The updates of a round. Of fewer than three valid ones none is rejected, since of two it is
            unknown which one is wrong.
        factor: How many times the median norm is allowed.
    """
    valid = [update for update in updates if update.training is not None]
    if len(valid) < 3:
        return
    median = float(np.median([update.update_norm for update in valid]))
    for update in valid:
        if update.update_norm > factor * median > 0:
            update.training = None
            update.rejection = (
                f"the update's norm {update.update_norm:.4g} is above {factor:g} times the round's median"
                f" {median:.4g}"
            )


def aggregate_metrics(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """Compute the metrics over all sites, weighted by their numbers of test images.

    The accuracy is exact: correct predictions of all sites over test images of all sites. The other metrics
    are weighted means, without the sites where a metric cannot be computed.

    Args:
        evaluations: One of each site.

    Returns:
        The metrics by name, and `test_examples`.
    """
    tested = [evaluation for evaluation in evaluations if evaluation.test_examples > 0]
    total = sum(evaluation.test_examples for evaluation in tested)
    if not total:
        return {"test_examples": 0}
    metrics: dict[str, float] = {}
    for name in METRICS:
        pairs = [(getattr(evaluation, name), evaluation.test_examples) for evaluation in tested]
        pairs = [(value, count) for value, count in pairs if not math.isnan(value)]
        if pairs:
            metrics[name] = sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
    # Each accuracy is a count over a count; rounding gives the count back exactly.
    correct = sum(round(evaluation.accuracy * evaluation.test_examples) for evaluation in tested)
    return {**metrics, "accuracy": correct / total, "test_examples": total}


def metrics_of_confusion(confusion: NDArray[np.int64]) -> dict[str, float]:
    """Compute accuracy, balanced_accuracy and f1 from a confusion matrix.

    As at a site, balanced accuracy is the mean recall and f1 the mean F1 of the classes that occur.

    Args:
        confusion: Counts, shape (classes, classes): rows are true classes, columns predicted ones; at least
            one image.
    """
    correct, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = true > 0
    recall, f1 = correct[occurs] / true[occurs], 2 * correct[occurs] / (true + predicted)[occurs]
    return {
        "accuracy": float(correct.sum() / true.sum()),
        "balanced_accuracy": float(recall.mean()),
        "f1": float(f1.mean()),
    }
