"""What an adaptation changed, in words: which heads, and towards and away from which descriptions."""

from fedsigma.common.explain.heads import ExplainError, HeadChange, head_changes
from fedsigma.common.explain.text_directions import Explainer, HeadWords, Phrases

__all__ = [
    "ExplainError",
    "Explainer",
    "HeadChange",
    "HeadWords",
    "Phrases",
    "head_changes",
]
