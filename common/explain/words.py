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

from fedsigma.common.explain.heads import ExplainError, HeadChange, adapted_layers, head_changes, matrix
from fedsigma.common.sigma.basis import Basis

__all__ = ["HeadWords", "Phrases", "explain_heads", "projection"]

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
class HeadWords:
    """What one head writes more and less of: descriptions with their g, the strongest first."""

    change: HeadChange
    gained: tuple[tuple[str, float], ...]
    lost: tuple[tuple[str, float], ...]


def explain_heads(
    model: nn.Module,
    basis: Basis,
    shift: Tensor,
    phrases: Phrases,
    features: Tensor,
    *,
    heads: int = 8,
    words: int = 5,
) -> list[HeadWords]:
    """Explain the heads that changed most.

    Args:
        model: the backbone, pretrained or adapted.
        basis: of the backbone and layout.
        shift: the sigma shift.
        phrases: the corpus.
        features: the corpus's text features in the pretrained model.
        heads: how many heads to explain.
        words: how many descriptions of each.

    Shapes: shift (layout size,), features (phrases, width of the joint space).

    Raises:
        ExplainError: what was adapted has no heads that can be told apart, or a tower's end is not linear.
    """
    layers = {(layer.tower, layer.layer): layer for layer in adapted_layers(model, basis)}
    unit = nn.functional.normalize(features.double() - features.double().mean(0), dim=1)
    found = []
    for change in head_changes(model, basis, shift)[:heads]:
        layer = layers[change.tower, change.layer]
        where = layer.rows(change.head)
        read_out = unit @ projection(model, change.tower).double()
        energies = [
            (read_out @ matrix(layer.output, d)[:, where] @ matrix(layer.value, d)[where, :]).square().sum(1)
            for d in (None, shift)
        ]
        gain = (energies[1] - energies[0]) / energies[0].mean().clamp_min(1e-30)
        found.append(_ranked(change, gain - gain.mean(), phrases.texts, words))
    return found


def _ranked(change: HeadChange, gain: Tensor, texts: Sequence[str], words: int) -> HeadWords:
    order = torch.argsort(gain, descending=True).tolist()
    gained = tuple((texts[i], float(gain[i])) for i in order[:words] if gain[i] > 0)
    lost = tuple((texts[i], float(gain[i])) for i in reversed(order[-words:]) if gain[i] < 0)
    return HeadWords(change, gained, lost)


def projection(model: nn.Module, tower: str) -> Tensor:
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
