"""What the server demands of a reply before it counts, and how the sites' evaluations are put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    from_record,
)

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = [
    "InvalidReply",
    "SiteEvaluation",
    "ValidUpdate",
    "aggregate_metrics",
    "aggregation_weight",
    "check_norm",
    "dot",
    "find_norm_outliers",
    "l2_norm",
    "metrics_of_confusion",
    "validate_evaluations",
    "validate_update",
]


_PIECE = 16_384


class InvalidReply(FedSigmaError, ValueError):
    """A reply does not count; the text says why, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class ValidUpdate:
    """A training reply that counts, without its change, which is most of it.

    update_norm, shift_norm: L2 norms of the change, and of the shift that it made. weight: its share in the
    mean. reply: with an empty change.
    """

    update_norm: float
    shift_norm: float
    weight: float
    reply: TrainReply

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars that the site told."""
        told = {**self.reply.evaluation.metrics(), "examples": self.reply.examples}
        if math.isnan(self.reply.loss):  # untold, for training is private
            return told | {"epsilon": self.reply.epsilon}
        return told | {"loss": self.reply.loss}


@dataclass(frozen=True, kw_only=True)
class SiteEvaluation:
    """How a shift did at one site.

    confusion: test images by true class, then by predicted class, row by row; empty if the site keeps it.
    """

    evaluation: Evaluation
    confusion: tuple[int, ...] = ()


def validate_evaluations(content: Any, *, shifts: int, classes: int) -> tuple[SiteEvaluation, ...]:
    """Check a reply to an `EvaluateTask` with so many shifts.

    Raises:
        Rejected: its form is not in order, or its counts contradict each other.
    """
    try:
        reply = from_record(EvaluateReply, content)
    except ProtocolError as error:
        raise InvalidReply(str(error)) from error
    told, size = reply.confusions, classes * classes
    if len(reply.evaluations) != shifts:
        raise InvalidReply(f"{len(reply.evaluations)} evaluations came for {shifts} shifts")
    if len(told) not in (0, shifts * size):
        raise InvalidReply(f"{len(told)} counts came for {shifts} confusion matrices of {classes} classes")
    found = []
    for number, evaluation in enumerate(reply.evaluations):
        matrix = told[number * size : (number + 1) * size]
        if matrix and sum(matrix) != evaluation.test_examples:
            raise InvalidReply(
                f"a confusion matrix counts {sum(matrix)} of {evaluation.test_examples} test images"
            )
        found.append(SiteEvaluation(evaluation=evaluation, confusion=matrix))
    return tuple(found)


def validate_update(
    content: Any, *, study: StudyConfig, layout: Layout, start: NDArray[np.float32], codec: str, steps: int
) -> tuple[ValidUpdate, NDArray[np.float32]]:
    """Check a training reply against the study; returns what is kept of it, and its change (layout size,).

    Args:
        content: the reply's record.
        study: the study, with its bounds.
        layout: the layout every shift of the study has.
        start: the server's shift, of which the site has sent the change (layout size,).
        codec: the level that was asked for.
        steps: the steps that were asked for.

    Raises:
        Rejected: its form, layout digest, length, type, finiteness, norm or example count is not in order.
    """
    federation = study.federation
    try:
        reply = from_record(TrainReply, content)
        change = decode(reply.update, layout, level=codec)
    except (ProtocolError, CodecError) as error:
        raise InvalidReply(str(error)) from error
    # The change is added to the shift itself, not to its coded form that the sites start from: what coding
    # took from that form must not enter the model.
    bound = None if study.privacy.of_sites else federation.norm_bound  # there a change is clipped instead
    shift_norm = check_norm(l2_norm(start, change), bound)
    if reply.examples > study.max_examples_per_site:
        raise InvalidReply(
            f"{reply.examples} training images are claimed, {study.shots} shots of {len(study.classes)}"
            f" classes allow {study.max_examples_per_site}"
        )
    if math.isnan(reply.loss) != study.privacy.in_training:
        raise InvalidReply(
            "the loss is not a number"
            if math.isnan(reply.loss)
            else "the loss is told, which in this study training keeps to itself: the site does not add noise"
        )
    if reply.steps > steps:
        raise InvalidReply(f"{reply.steps} steps were taken, {steps} were asked for")
    if len(reply.class_counts) not in (0, len(study.classes)):
        raise InvalidReply(
            f"{len(reply.class_counts)} class counts were told for {len(study.classes)} classes"
        )
    accepted = ValidUpdate(
        update_norm=l2_norm(change),
        shift_norm=shift_norm,
        weight=aggregation_weight(reply.examples, study),
        reply=replace(reply, update=b""),
    )
    return accepted, change


def aggregation_weight(examples: int, study: StudyConfig) -> int:
    """How many images a site with so many counts for."""
    return min(examples, study.federation.max_examples or examples)


def dot(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """The inner product of two vectors (values,), in float64.

    Not by `@`: BLAS starts threads for so few values, which on a busy machine takes a hundred times as long,
    and its last bit depends on their number. In pieces, for new arrays cost more than what is done with them.
    """
    total = 0.0
    for part in _pieces(one.size):
        total += float(np.einsum("i,i->", one[part].astype(np.float64), other[part].astype(np.float64)))
    return total


def l2_norm(*vectors: NDArray[np.floating]) -> float:
    """The L2 norm of a vector, or of the sum of several (values,); in float64, in pieces as `inner`."""
    total = 0.0
    for part in _pieces(vectors[0].size):
        added = vectors[0][part].astype(np.float64)
        for other in vectors[1:]:
            added += other[part]
        total += float(np.einsum("i,i->", added, added))
    return math.sqrt(total)


def _pieces(values: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, values, _PIECE))


def check_norm(norm: float, bound: float | None) -> float:
    """Refuse a shift that is too long; returns its norm.

    Raises:
        Rejected: its L2 norm is above the bound, if there is one.
    """
    if bound is not None and norm > bound:
        raise InvalidReply(f"the shift's norm {norm:.4g} is above the bound {bound:g}")
    return norm


def find_norm_outliers(accepted: Mapping[int, ValidUpdate], factor: float | None) -> dict[int, str]:
    """The replies of a round whose changes are out of all proportion to the others', with the reason.

    Sites make equally many steps by one recipe, so honest changes have similar norms whatever the images; a
    mean has no defence of its own against one that is many times as long. The median is that of all replies,
    of which there must be three: of two, nobody can say which one is wrong.
    """
    if factor is None or len(accepted) < 3:
        return {}
    typical = float(np.median([one.update_norm for one in accepted.values()]))
    bound = factor * typical
    words = f"is above {factor:g} times the round's median {typical:.4g}"
    return {
        node: f"the change's norm {one.update_norm:.4g} {words}"
        for node, one in accepted.items()
        if one.update_norm > bound > 0
    }


def aggregate_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Put the sites' evaluations together, each site weighted by its number of test images.

    The accuracy is exact: right answers of all sites over test images of all sites. The other metrics are
    means of the sites' values, without the sites where a metric cannot be computed.
    """
    told = [one for one in evaluations.values() if one.test_examples > 0]
    total = sum(one.test_examples for one in told)
    if not total:
        return {"test_examples": 0}
    pooled: dict[str, float] = {}
    for name in METRICS:
        known = [(getattr(one, name), one.test_examples) for one in told]
        known = [(value, count) for value, count in known if not math.isnan(value)]
        if known:
            pooled[name] = sum(value * count for value, count in known) / sum(count for _, count in known)
    # Each accuracy is a count over a count; rounding gives the count back exactly.
    pooled["accuracy"] = sum(round(one.accuracy * one.test_examples) for one in told) / total
    return {**pooled, "test_examples": total}


def metrics_of_confusion(confusion: NDArray[np.int64]) -> dict[str, float]:
    """The metrics that a confusion matrix (classes, classes) settles: accuracy, balanced_accuracy and f1.

    Rows are true classes, columns predicted ones; at least one image. As at a site, balanced accuracy is the
    mean recall and f1 the mean F1 of the classes that occur.
    """
    right, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = true > 0
    recall, f1 = right[occurs] / true[occurs], 2 * right[occurs] / (true + said)[occurs]
    return {
        "accuracy": float(right.sum() / true.sum()),
        "balanced_accuracy": float(recall.mean()),
        "f1": float(f1.mean()),
    }
