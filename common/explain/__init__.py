"""What an adaptation changed, in words: which heads, and towards and away from which descriptions."""

from fedsigma.common.explain.heads import ExplainError, HeadChange, head_changes
from fedsigma.common.explain.words import HeadWords, Phrases, explain_heads

__all__ = [
    "ExplainError",
    "HeadChange",
    "HeadWords",
    "Phrases",
    "explain_heads",
    "head_changes",
]
