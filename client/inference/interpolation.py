"""Metrics along a line of shifts, from the pretrained model to an adapted one or between two versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedsigma.client.inference.loaded_model import LoadedModel, prepare_evaluation, select_labelled
from fedsigma.common.data.records import Source
from fedsigma.common.registry import ModelError
from fedsigma.common.registry.shift_file import SavedShift
from fedsigma.common.registry.task_arithmetic import combine
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import compute_metrics

__all__ = ["CurvePoint", "evaluate_curve"]


@dataclass(frozen=True)
class CurvePoint:
    """One point of the line.

    Attributes:
        factor: Factor of the version.
        metrics: Metrics over all labelled images, from 0 to 1.
    """

    factor: float
    metrics: dict[str, float]


def evaluate_curve(
    model: LoadedModel, other: SavedShift | None, source: Source, factors: Sequence[float]
) -> Iterator[CurvePoint]:
    """Evaluate (1 - t) a + t b for each factor t; without `other`, evaluate t a.

    Args:
        model: The version a, loaded on its backbone.
        other: The version b.
        source: Labelled images; images of other classes are ignored.
        factors: The factors t.

    Raises:
        ModelError: No image has a class of the study, or the versions have different bases.
    """
    records = select_labelled(model, source)
    if not records:
        raise ModelError(f"no image has one of the classes {', '.join(model.study.classes)}")
    classifier, examples = prepare_evaluation(model, source, records)
    for factor in factors:
        first = factor if other is None else 1 - factor
        ends = [(model.saved, first), *([(other, factor)] if other is not None else [])]
        model.sigma.set_shift(combine(ends).shift)
        yield CurvePoint(factor, compute_metrics(evaluate(classifier, examples)).to_dict())
