"""Descriptions that attention heads write more and less of after adaptation.

A head h of a layer reads x and writes OV_h x into the residual stream, OV_h = W_o[:, C] W_v[R, :]. The last
norm's scale and the projection, P, map the residual stream to the joint space of images and texts. For a
description with the text feature t (centred on the corpus and of length 1)

    e(t) = ||t^T P OV_h||^2

is the energy of the head's response along t, over inputs of unit covariance. A shift changes it by
g(t) = (e'(t) - e(t)) / mean_t e(t), less its mean over the corpus: positive is gained, negative lost. g needs
no image, does not depend on the signs of singular vectors, and ignores later layers (as a logit lens does).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fedsigma.common.explain.heads import (
    ExplainError,
    HeadEnergy,
    find_attention_layers,
    head_matrices,
    rank_heads,
)
from fedsigma.common.sigma.basis import Basis

_NORMS = ("ln_post", "fc_norm", "norm", "ln_final")


@dataclass(frozen=True)
class Phrases:
    """A corpus of descriptions.

    Attributes:
        texts: the descriptions.
        kinds: the kind of each, such as `texture`.
    """

    texts: tuple[str, ...]
    kinds: tuple[str, ...]

    @classmethod
    def bundled(cls) -> Phrases:
        """The corpus that comes with FedSigma, for biomedical images."""
        return cls.parse(files(__package__).joinpath("phrases.yaml").read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> Phrases:
        """Parse a YAML list of descriptions, or a mapping of kinds to lists.

        Raises:
            ExplainError: it is neither, or has fewer than two descriptions.
        """
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ExplainError(f"the descriptions are invalid YAML: {error}") from None
        table = {"own": values} if isinstance(values, list) else values
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise ExplainError("the descriptions must be a YAML list, or a mapping of kinds to lists")
        pairs = [(str(text).strip(), str(kind)) for kind, texts in table.items() for text in texts]
        pairs = list(dict(pairs).items())
        if len(pairs) < 2:
            raise ExplainError("fewer than two descriptions: expected at least two to rank")
        return cls(tuple(text for text, _ in pairs), tuple(kind for _, kind in pairs))


@dataclass(frozen=True)
class HeadExplanation:
    """The descriptions that one head writes more and less of.

    Attributes:
        head: the head and its share of the shift.
        gained: descriptions with their g, the strongest first.
        lost: descriptions with their g, the strongest first.
    """

    head: HeadEnergy
    gained: tuple[tuple[str, float], ...]
    lost: tuple[tuple[str, float], ...]


class Explainer:
    """Explains shifts of one model.

    Args:
        model: the backbone, pretrained or adapted.
        basis: its basis.
        phrases: the corpus.
        features: the corpus's text features in the pretrained model, shape (phrases, joint width).

    Raises:
        ExplainError: no layer has both its value and its output matrix adapted.
    """

    def __init__(self, model: nn.Module, basis: Basis, phrases: Phrases, features: Tensor) -> None:
        self._model, self._basis, self._phrases = model, basis, phrases
        self._layers = {(layer.tower, layer.layer): layer for layer in find_attention_layers(model, basis)}
        self._directions = nn.functional.normalize(features.double() - features.double().mean(0), dim=1)
        self._projected: dict[str, Tensor] = {}
        self._pretrained: dict[tuple[str, int, int], Tensor] = {}

    def explain(self, shift: Tensor, *, heads: int = 8, phrases: int = 5) -> list[HeadExplanation]:
        """Explain the heads with the largest shares of a shift.

        Args:
            shift: the sigma shift, shape (layout size,).
            heads: how many heads to explain.
            phrases: how many gained and lost descriptions to give for each head.

        Raises:
            ExplainError: a tower does not end in a norm and one matrix.
        """
        texts, explanations = self._phrases.texts, []
        for head in rank_heads(self._model, self._basis, shift)[:heads]:
            key = head.tower, head.layer, head.head
            if key not in self._pretrained:
                self._pretrained[key] = self._energies(head, None)
            before, after = self._pretrained[key], self._energies(head, shift)
            gain = (after - before) / before.mean().clamp_min(1e-30)
            gain = gain - gain.mean()
            order = torch.argsort(gain, descending=True).tolist()
            gained = tuple((texts[i], float(gain[i])) for i in order[:phrases] if gain[i] > 0)
            lost = tuple((texts[i], float(gain[i])) for i in reversed(order[-phrases:]) if gain[i] < 0)
            explanations.append(HeadExplanation(head, gained, lost))
        return explanations

    def _energies(self, head: HeadEnergy, shift: Tensor | None) -> Tensor:
        """e(t) of a head for each description, with a shift or without."""
        if head.tower not in self._projected:
            projection = joint_space_projection(self._model, head.tower)
            self._projected[head.tower] = self._directions @ projection.double()
        writes, reads = head_matrices(self._layers[head.tower, head.layer], head.head, shift)
        return (self._projected[head.tower] @ writes @ reads).square().sum(1)


def joint_space_projection(model: nn.Module, tower: str) -> Tensor:
    """P (joint width, tower width): from the residual stream to the joint space, with the last norm's scale.

    Raises:
        ExplainError: the tower does not end in a norm and one matrix.
    """
    owner = model.visual if tower == "image" else getattr(model, "text", model)
    trunk = getattr(owner, "trunk", owner)
    norms = [n for name in _NORMS if isinstance(n := getattr(trunk, name, None), nn.LayerNorm)]
    matrix = _last_matrix(owner)
    if not norms or matrix is None:
        raise ExplainError(
            f"the {tower} tower does not end in a norm and one matrix: its heads cannot be explained in the"
            " joint space"
        )
    return matrix.detach() * norms[0].weight.detach()


def _last_matrix(owner: Any) -> Tensor | None:
    """The projection (joint width, tower width)."""
    for name in ("proj", "text_projection"):
        projection = getattr(owner, name, None)
        if isinstance(projection, nn.Linear):
            return projection.weight
        if isinstance(projection, Tensor):
            return projection.T
    linears = [m for m in getattr(owner, "head", nn.Identity()).modules() if isinstance(m, nn.Linear)]
    return linears[0].weight if len(linears) == 1 else None
