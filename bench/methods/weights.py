"""Methods that train weights of the towers: all of them, the layer norms, or low-rank changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bench.methods.method import TrainedMethod, Vector
from bench.methods.tuning import State, TensorShift
from fedsigma.common.backbones import Backbone
from fedsigma.common.config.constants import TOWERS
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma import Entry, find_layout
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.prompts import PromptEncoder
from fedsigma.common.training.trainer import derive_seed

__all__ = ["FullTuning", "LayerNorms", "Lora", "LoraProducts"]


def _trained(backbone: Backbone, wanted: Callable[[str], bool]) -> State:
    return {
        name: weight.detach().clone() for name, weight in backbone.model.named_parameters() if wanted(name)
    }


class _Weights(TrainedMethod):
    """Some of the model's own parameters, as they are."""

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...], wanted: Callable[[str], bool]) -> None:
        tuning = TensorShift(backbone.model, _trained(backbone, wanted), weights=dict, towers=TOWERS)
        super().__init__(ClipClassifier(backbone, tuning, prompts), tuning)  # type: ignore[arg-type]


class FullTuning(_Weights):
    """Every parameter of both towers, but the logit scale, which no method here trains.

    Running statistics of batch norms stay, for the model stays in eval mode under every method.
    """

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...]) -> None:
        super().__init__(backbone, prompts, lambda name: name not in ("logit_scale", "logit_bias"))
        # Prompts that are cut have the tower's positions replaced, and here these are trained.
        self.task.prompts = PromptEncoder(backbone, prompts, cut=False)


class LayerNorms(_Weights):
    """Scale and offset of every layer norm of both towers."""

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...]) -> None:
        norms = tuple(
            f"{name}." for name, module in backbone.model.named_modules() if isinstance(module, nn.LayerNorm)
        )
        super().__init__(backbone, prompts, lambda name: name.startswith(norms))


class Lora(TrainedMethod):
    """CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv:2405.18541): W0 + B A / sqrt(r) for q, k, v of both towers.

    Each of q, k and v has a pair of its own, also where the model packs them into one matrix. peft has one
    pair for a packed matrix: other values, and fewer of them. No dropout: a change of the weight has no input
    of its own. The server averages the factors, A and B each by itself.

    Args:
        backbone: adapted here.
        prompts: one a class.
        seed: of the first A, which is the same at all sites; B starts at zero.
        rank: r.
    """

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...], *, seed: int, rank: int = 2) -> None:
        self._entries = find_layout(backbone.model, SigmaConfig(parts=("q", "k", "v"))).entries
        self._scale = 1 / math.sqrt(rank)
        self._rank = rank
        parameters = dict(backbone.model.named_parameters())
        frozen = {entry.weight: parameters[entry.weight].detach() for entry in self._entries}
        self._columns = {name: weight.shape[1] for name, weight in frozen.items()}
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora"))
        start: State = {}
        for entry in self._entries:
            columns = self._columns[entry.weight]
            a = torch.rand(rank, columns, generator=generator) * 2 - 1
            start[f"{entry.key}.A"] = a / math.sqrt(columns)
            start[f"{entry.key}.B"] = torch.zeros(_rows(entry), rank)

        def weights(tensors: Mapping[str, Tensor]) -> State:
            blocks: dict[str, list[tuple[Entry, Tensor]]] = {name: [] for name in frozen}
            for entry in self._entries:
                blocks[entry.weight].append((entry, self._product(tensors, entry)))
            return {name: _changed(frozen[name], found) for name, found in blocks.items()}

        tuning = TensorShift(backbone.model, start, weights=weights, towers=TOWERS)
        super().__init__(ClipClassifier(backbone, tuning, prompts), tuning)  # type: ignore[arg-type]

    def _product(self, tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
        return self._scale * tensors[f"{entry.key}.B"] @ tensors[f"{entry.key}.A"]


class LoraProducts(Lora):
    """As `Lora`, but the server averages the products B A, and cuts their mean to rank r for the next round.

    An upload is the same; the mean of products is what the sites' models mean, while the product of means
    is not. The mean has up to r ranks a site; the server's next state is its best approximation of rank r,
    with A's rows of length one (Bai et al. 2024, arXiv:2402.11505).
    """

    def to_vector(self, state: State) -> Vector:
        """The products, one after another."""
        parts = [self._product(state, entry).flatten() for entry in self._entries]
        return torch.cat(parts).numpy().astype(np.float64)

    def from_vector(self, vector: Vector) -> State:
        """The factors of the best approximation."""
        found, start = dict[str, Tensor](), 0
        for entry in self._entries:
            shape = _rows(entry), self._columns[entry.weight]
            part = torch.from_numpy(vector[start : start + math.prod(shape)].astype(np.float32)).view(shape)
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            found[f"{entry.key}.A"] = vh[: self._rank].contiguous()
            found[f"{entry.key}.B"] = u[:, : self._rank] * s[: self._rank] / self._scale
            start += math.prod(shape)
        return found


def _rows(entry: Entry) -> int:
    return entry.rows[1] - entry.rows[0]


def _changed(weight: Tensor, blocks: list[tuple[Entry, Tensor]]) -> Tensor:
    """The weight with products added to its row blocks, which follow each other; others stay."""
    parts, done = [], 0
    for entry, product in blocks:
        low, high = entry.rows
        parts += [weight[done:low], weight[low:high] + product]
        done = high
    return torch.cat([*parts, weight[done:]])
