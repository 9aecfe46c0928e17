"""Metrics along a line of shifts, from the pretrained model to an adapted one or between two versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsigma.client.inference.loaded_model import LoadedModel, prepare_evaluation
from fedsigma.common.data.records import Source
from fedsigma.common.registry import ModelError
from fedsigma.common.registry.shift_file import SavedShift
from fedsigma.common.registry.task_arithmetic import combine
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import compute_metrics

__all__ = ["evaluate_curve"]


def evaluate_curve(
    model: LoadedModel, other: SavedShift | None, source: Source, factors: Sequence[float]
) -> Iterator[tuple[float, dict[str, float]]]:
    """Evaluate (1 - t) a + t b for each factor t, of the model a and `other`; without `other`, evaluate t a.

    Yields the factor and the metrics over all labelled images, from 0 to 1; other classes are ignored.

    Raises:
        ModelError: No image has a class of the study, or the versions have different bases.
    """
    classifier, examples = prepare_evaluation(model, source)
    if not examples:
        raise ModelError(f"no image has one of the classes {', '.join(model.study.classes)}")
    for factor in factors:
        first = factor if other is None else 1 - factor
        ends = [(model.saved, first), *([(other, factor)] if other is not None else [])]
        model.sigma.set_shift(combine(ends).shift)
        yield factor, compute_metrics(evaluate(classifier, examples)).to_dict()
