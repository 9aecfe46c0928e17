"""How accuracy moves along a line of shifts: from the pretrained model to an adapted one, or between two."""

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
    """One place on the line: the factor, and the metrics over all labelled images, shares between 0 and 1."""

    factor: float
    metrics: dict[str, float]


def evaluate_curve(
    model: LoadedModel, other: SavedShift | None, source: Source, factors: Sequence[float]
) -> Iterator[CurvePoint]:
    """Judge (1 - t) a + t b for each factor t; without `other`, t a: 0 is the pretrained model.

    Args:
        restored: the version a on its backbone.
        other: the version b.
        source: labelled images; those of other classes are left out.
        factors: of b, or of a alone.

    Raises:
        ModelError: no image has a class of the study, or the two are of different bases.
    """
    records = select_labelled(model, source)
    if not records:
        raise ModelError(f"no image there has one of the classes {', '.join(model.study.classes)}")
    task, examples = prepare_evaluation(model, source, records)
    for factor in factors:
        own = factor if other is None else 1 - factor
        ends = [(model.saved, own), *([(other, factor)] if other is not None else [])]
        model.sigma.set_shift(combine(ends).shift)
        yield CurvePoint(factor, compute_metrics(evaluate(task, examples)).to_dict())
