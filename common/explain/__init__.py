"""Explanations of a shift: which heads it changed, towards and away from which descriptions."""

from fedsigma.common.explain.heads import ExplainError, HeadEnergy, rank_heads
from fedsigma.common.explain.text_directions import Explainer, HeadExplanation, Phrases

__all__ = [
    "ExplainError",
    "Explainer",
    "HeadEnergy",
    "HeadExplanation",
    "Phrases",
    "rank_heads",
]
