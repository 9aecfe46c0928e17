"""What heads write more and less of, in words.

A head h of a layer reads x and writes OV_h x into the residual stream, OV_h = W_o[:, C] W_v[R, :]. The last
norm's scale and the projection, P, take what is written to the joint space of images and texts. For a
description with the text feature t (centred on the corpus and of length 1) the head can write

    e(t) = ||t^T P OV_h||^2

of it: the energy of its response along t, over inputs of unit covariance. What the adaptation changed is
g(t) = (e'(t) - e(t)) / mean_t e(t), less its mean over the corpus: positive is gained, negative lost. It
needs no image, depends on no sign of a singular vector, and leaves out what later layers do with what the
head writes (as a logit lens does).
"""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["Explainer", "HeadExplanation", "Phrases", "joint_space_projection"]

_NORMS = ("ln_post", "fc_norm", "norm", "ln_final")


@dataclass(frozen=True)
class Phrases:
    """A corpus of descriptions. kinds: of each, such as `texture`."""

    texts: tuple[str, ...]
    kinds: tuple[str, ...]

    @classmethod
    def bundled(cls) -> Phrases:
        """The corpus that comes with FedSigma: what can be seen in biomedical pictures."""
        return cls.parse(files(__package__).joinpath("phrases.yaml").read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> Phrases:
        """Read YAML: a mapping of kinds to lists of descriptions, or a list.

        Raises:
            ExplainError: it is neither, or has fewer than two descriptions.
        """
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ExplainError(f"the descriptions do not read as YAML: {error}") from None
        table = {"own": values} if isinstance(values, list) else values
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise ExplainError("the descriptions are no YAML list, or mapping of kinds to lists")
        pairs = [(str(text).strip(), str(kind)) for kind, texts in table.items() for text in texts]
        pairs = list(dict(pairs).items())
        if len(pairs) < 2:
            raise ExplainError("fewer than two descriptions: there is nothing to rank")
        return cls(tuple(text for text, _ in pairs), tuple(kind for _, kind in pairs))


@dataclass(frozen=True)
class HeadExplanation:
    """What one head writes more and less of: descriptions with their g, the strongest first."""

    head: HeadEnergy
    gained: tuple[tuple[str, float], ...]
    lost: tuple[tuple[str, float], ...]


class Explainer:
    """Explains shifts of one model. What depends on model and corpus alone is computed once.

    Args:
        model: the backbone, pretrained or adapted.
        basis: of the backbone and layout.
        phrases: the corpus.
        features: the corpus's text features in the pretrained model.

    Shapes: features (phrases, width of the joint space).

    Raises:
        ExplainError: what was adapted has no heads that can be told apart.
    """

    def __init__(self, model: nn.Module, basis: Basis, phrases: Phrases, features: Tensor) -> None:
        self._model, self._basis, self._phrases = model, basis, phrases
        self._layers = {(layer.tower, layer.layer): layer for layer in find_attention_layers(model, basis)}
        self._unit = nn.functional.normalize(features.double() - features.double().mean(0), dim=1)
        self._read_outs: dict[str, Tensor] = {}
        self._pretrained: dict[tuple[str, int, int], Tensor] = {}

    def explain(self, shift: Tensor, *, heads: int = 8, phrases: int = 5) -> list[HeadExplanation]:
        """Explain the heads that a shift changed most.

        Args:
            shift: the sigma shift.
            heads: how many heads to explain.
            phrases: how many descriptions of each head, gained and lost.

        Shapes: shift (layout size,).

        Raises:
            ExplainError: a tower's end is not linear.
        """
        found = []
        for change in rank_heads(self._model, self._basis, shift)[:heads]:
            place = change.tower, change.layer, change.head
            if place not in self._pretrained:
                self._pretrained[place] = self._energies(change, None)
            before, after = self._pretrained[place], self._energies(change, shift)
            gain = (after - before) / before.mean().clamp_min(1e-30)
            found.append(_ranked(change, gain - gain.mean(), self._phrases.texts, phrases))
        return found

    def _energies(self, change: HeadEnergy, shift: Tensor | None) -> Tensor:
        """e(t) of a head for each description, with a shift or without."""
        writes, reads = head_matrices(self._layers[change.tower, change.layer], change.head, shift)
        return (self._read_out(change.tower) @ writes @ reads).square().sum(1)

    def _read_out(self, tower: str) -> Tensor:
        if tower not in self._read_outs:
            self._read_outs[tower] = self._unit @ joint_space_projection(self._model, tower).double()
        return self._read_outs[tower]


def _ranked(change: HeadEnergy, gain: Tensor, texts: Sequence[str], phrases: int) -> HeadExplanation:
    order = torch.argsort(gain, descending=True).tolist()
    gained = tuple((texts[i], float(gain[i])) for i in order[:phrases] if gain[i] > 0)
    lost = tuple((texts[i], float(gain[i])) for i in reversed(order[-phrases:]) if gain[i] < 0)
    return HeadExplanation(change, gained, lost)


def joint_space_projection(model: nn.Module, tower: str) -> Tensor:
    """P: from the residual stream of a tower to the joint space, the last norm's scale included.

    Shapes: (width of the joint space, width of the tower).

    Raises:
        ExplainError: the tower ends otherwise than in a norm and one matrix.
    """
    owner = model.visual if tower == "image" else getattr(model, "text", model)
    trunk = getattr(owner, "trunk", owner)
    names = [n for n in _NORMS if isinstance(getattr(trunk, n, None), nn.LayerNorm)]
    linear = _last_matrix(owner)
    if not names or linear is None:
        raise ExplainError(
            f"the {tower} tower ends otherwise than in a norm and one matrix: what its heads write cannot be"
            " read in the joint space"
        )
    return linear.detach() * getattr(trunk, names[0]).weight.detach()


def _last_matrix(owner: Any) -> Tensor | None:
    """The projection as (joint, tower)."""
    for name in ("proj", "text_projection"):
        found = getattr(owner, name, None)
        if isinstance(found, nn.Linear):
            return found.weight
        if isinstance(found, Tensor):
            return found.T
    linears = [m for m in getattr(owner, "head", nn.Identity()).modules() if isinstance(m, nn.Linear)]
    return linears[0].weight if len(linears) == 1 else None
