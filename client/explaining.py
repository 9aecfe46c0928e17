"""Saying in words what a finished study's adaptation changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedsigma.client.applying import Restored
from fedsigma.common.explain import HeadWords, Phrases, explain_heads

__all__ = ["explain", "in_words", "to_rows"]

BATCH = 64


def explain(
    restored: Restored, phrases: Phrases, *, template: str = "{}", heads: int = 8, words: int = 5
) -> list[HeadWords]:
    """Explain a study's shift by the heads that it changed most.

    Args:
        restored: the study's result on its backbone.
        phrases: the descriptions.
        template: into which each description is put before the text tower reads it.
        heads: how many heads.
        words: how many descriptions of each, gained and lost.

    Raises:
        ExplainError: as `explain_heads`.
    """
    sigma, shift = restored.sigma, restored.sigma.get_shift().clone()
    features = _text_features(restored, [template.format(text) for text in phrases.texts])
    return explain_heads(
        restored.backbone.model, sigma.basis, shift, phrases, features, heads=heads, words=words
    )


def _text_features(restored: Restored, texts: Sequence[str]) -> torch.Tensor:
    """The descriptions' features in the pretrained model: what words meant before."""
    sigma, backbone = restored.sigma, restored.backbone
    shift = sigma.get_shift().clone()
    sigma.set_shift(torch.zeros_like(shift))
    try:
        with torch.no_grad():
            tokens = backbone.tokenizer(list(texts))
            model: Any = backbone.model
            parts = [model.encode_text(some) for some in tokens.split(BATCH)]
    finally:
        sigma.set_shift(shift)
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def to_rows(found: Sequence[HeadWords]) -> list[dict[str, Any]]:
    """As JSON's own types."""
    return [
        {
            "tower": one.change.tower,
            "layer": one.change.layer,
            "head": one.change.head,
            "share": one.change.share,
            "value": one.change.value,
            "output": one.change.output,
            "gained": [{"phrase": text, "g": g} for text, g in one.gained],
            "lost": [{"phrase": text, "g": g} for text, g in one.lost],
        }
        for one in found
    ]


def in_words(found: Sequence[HeadWords]) -> str:
    """As text for people."""
    lines = []
    for one in found:
        change = one.change
        lines.append(
            f"{change.tower} tower, layer {change.layer + 1}, head {change.head + 1}:"
            f" {100 * change.share:.1f} % of the heads' change"
        )
        for name, told in (("more of", one.gained), ("less of", one.lost)):
            if told:
                lines.append(f"  {name:<8} " + "; ".join(text for text, _ in told))
    return "\n".join(lines)
