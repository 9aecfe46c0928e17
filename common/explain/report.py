"""Explanations of shifts by a backbone's own text tower, as rows and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fedsigma.common.backbones import Backbone
from fedsigma.common.explain.text_directions import Explainer, HeadExplanation, Phrases
from fedsigma.common.sigma import SigmaModel

BATCH = 64


def build_explainer(
    backbone: Backbone, sigma: SigmaModel, phrases: Phrases, *, template: str = "{}"
) -> Explainer:
    """Build the explainer of an adapted backbone's shifts; the model's own shift stays as it is.

    Args:
        backbone: the backbone.
        sigma: the adapter of the backbone's model.
        phrases: the descriptions.
        template: the prompt of a description, with {} in its place.

    Raises:
        ExplainError: as `Explainer`.
    """
    features = _text_features(backbone, sigma, [template.format(text) for text in phrases.texts])
    return Explainer(backbone.model, sigma.basis, phrases, features)


def _text_features(backbone: Backbone, sigma: SigmaModel, texts: list[str]) -> Tensor:
    """The descriptions' features in the pretrained model."""
    shift = sigma.get_shift()
    sigma.set_shift(torch.zeros_like(shift))
    try:
        with torch.no_grad():
            tokens = backbone.tokenizer(texts).to(sigma.shift.device)
            model: Any = backbone.model
            parts = [model.encode_text(part) for part in torch.split(tokens, BATCH)]
    finally:
        sigma.set_shift(shift)
    return torch.nn.functional.normalize(torch.cat(parts), dim=1).cpu()


def to_rows(explanations: Sequence[HeadExplanation]) -> list[dict[str, Any]]:
    """Explanations as JSON values; layers and heads are counted from 0."""
    return [
        {
            **asdict(explanation.head),
            "gained": [{"phrase": text, "g": g} for text, g in explanation.gained],
            "lost": [{"phrase": text, "g": g} for text, g in explanation.lost],
        }
        for explanation in explanations
    ]


def format_explanation(explanations: Sequence[HeadExplanation]) -> str:
    """Explanations as text; layers and heads are counted from 1."""
    lines = []
    for explanation in explanations:
        head = explanation.head
        lines.append(
            f"{head.tower} tower, layer {head.layer + 1}, head {head.head + 1}:"
            f" {100 * head.share:.1f} % of the heads' change"
        )
        for name, phrases in (("more of", explanation.gained), ("less of", explanation.lost)):
            if phrases:
                lines.append(f"  {name:<8} " + "; ".join(text for text, _ in phrases))
    return "\n".join(lines)
