"""How accuracy moves along a line of shifts: from the pretrained model to an adapted one, or between two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedsigma.client.applying import Restored
from fedsigma.common.artefact import SavedSigma
from fedsigma.common.data import Source, load_examples
from fedsigma.common.metrics import score
from fedsigma.common.models import ModelError
from fedsigma.common.models.arithmetic import combine
from fedsigma.common.training import Task, evaluate

__all__ = ["Point", "curve"]


@dataclass(frozen=True)
class Point:
    """One place on the line: the factor, and the metrics over all labelled images, shares between 0 and 1."""

    factor: float
    metrics: dict[str, float]


def curve(
    restored: Restored, other: SavedSigma | None, source: Source, factors: Sequence[float]
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
    classes = list(restored.study.classes)
    records = [record for record in source.records if record.label in classes]
    if not records:
        raise ModelError(f"no image there has one of the classes {', '.join(classes)}")
    examples = load_examples(source, records, classes, side=restored.backbone.image_size * 3 // 2)
    task = Task(restored.backbone, restored.sigma, list(restored.study.prompts))
    for factor in factors:
        own = factor if other is None else 1 - factor
        ends = [(restored.saved, own), *([(other, factor)] if other is not None else [])]
        restored.sigma.set_shift(combine(ends).shift)
        yield Point(factor, score(evaluate(task, examples)).scalars())
