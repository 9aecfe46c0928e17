"""How accuracy moves along a line of shifts: from the pretrained model to an adapted one, or between two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedsigma.client.inference.loaded_model import LoadedModel, labelled, to_judge
from fedsigma.common.data.records import Source
from fedsigma.common.registry import ModelError
from fedsigma.common.registry.shift_file import SavedShift
from fedsigma.common.registry.task_arithmetic import combine
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import compute_metrics

__all__ = ["Point", "curve"]


@dataclass(frozen=True)
class Point:
    """One place on the line: the factor, and the metrics over all labelled images, shares between 0 and 1."""

    factor: float
    metrics: dict[str, float]


def curve(
    restored: LoadedModel, other: SavedShift | None, source: Source, factors: Sequence[float]
) -> Iterator[Point]:
    """Judge (1 - t) a + t b for each factor t; without `other`, t a: 0 is the pretrained model.

    Args:
        restored: the version a on its backbone.
        other: the version b.
        source: labelled images; those of other classes are left out.
        factors: of b, or of a alone.

    Raises:
        ModelError: no image has a class of the study, or the two are of different bases.
    """
    records = labelled(restored, source)
    if not records:
        raise ModelError(f"no image there has one of the classes {', '.join(restored.study.classes)}")
    task, examples = to_judge(restored, source, records)
    for factor in factors:
        own = factor if other is None else 1 - factor
        ends = [(restored.saved, own), *([(other, factor)] if other is not None else [])]
        restored.sigma.set_shift(combine(ends).shift)
        yield Point(factor, compute_metrics(evaluate(task, examples)).to_dict())
