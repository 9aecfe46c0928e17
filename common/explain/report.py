"""Whole shifts in words: the descriptions' features, the heads that changed most, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsigma.common.backbones import Backbone
from fedsigma.common.explain.text_directions import Explainer, HeadExplanation, Phrases
from fedsigma.common.sigma import SigmaModel

__all__ = ["build_explainer", "format_explanation", "to_rows"]

BATCH = 64


def build_explainer(
    backbone: Backbone, sigma: SigmaModel, phrases: Phrases, *, template: str = "{}"
) -> Explainer:
    """What explains shifts of a model; the model's own shift is as before afterwards.

    Args:
        backbone: whose model `sigma` wraps.
        sigma: the adapter, with the basis.
        phrases: the descriptions.
        template: into which each description is put before the text tower reads it.

    Raises:
        ExplainError: as `Explainer`.
    """
    features = _text_features(backbone, sigma, [template.format(text) for text in phrases.texts])
    return Explainer(backbone.model, sigma.basis, phrases, features)


def _text_features(backbone: Backbone, sigma: SigmaModel, texts: Sequence[str]) -> Tensor:
    """The descriptions' features in the pretrained model: what words meant before."""
    before = sigma.get_shift().clone()
    sigma.set_shift(torch.zeros_like(before))
    try:
        with torch.no_grad():
            device = next(backbone.model.parameters()).device
            tokens = backbone.tokenizer(list(texts)).to(device)
            model: Any = backbone.model
            parts = [model.encode_text(some) for some in tokens.split(BATCH)]
    finally:
        sigma.set_shift(before)
    return torch.nn.functional.normalize(torch.cat(parts), dim=1).cpu()


def to_rows(found: Sequence[HeadExplanation]) -> list[dict[str, Any]]:
    """As JSON's own types; layers and heads counted from 0."""
    return [
        {
            "tower": one.head.tower,
            "layer": one.head.layer,
            "head": one.head.head,
            "share": one.head.share,
            "value": one.head.value,
            "output": one.head.output,
            "gained": [{"phrase": text, "g": g} for text, g in one.gained],
            "lost": [{"phrase": text, "g": g} for text, g in one.lost],
        }
        for one in found
    ]


def format_explanation(found: Sequence[HeadExplanation]) -> str:
    """As text for people, who count from 1."""
    lines = []
    for one in found:
        change = one.head
        lines.append(
            f"{change.tower} tower, layer {change.layer + 1}, head {change.head + 1}:"
            f" {100 * change.share:.1f} % of the heads' change"
        )
        for name, told in (("more of", one.gained), ("less of", one.lost)):
            if told:
                lines.append(f"  {name:<8} " + "; ".join(text for text, _ in told))
    return "\n".join(lines)
