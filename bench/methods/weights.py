"""Methods that train weights of the towers: all of them, the layer norms, or low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bench.methods.method import Method, Vector
from bench.methods.tuning import State, TensorShift
from fedsigma.common.backbones import Backbone
from fedsigma.common.config.constants import TOWERS
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma import Entry, find_layout
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.prompts import PromptEncoder
from fedsigma.common.training.trainer import derive_seed


def _trained(backbone: Backbone, is_trained: Callable[[str], bool]) -> State:
    return {
        name: weight.detach().clone()
        for name, weight in backbone.model.named_parameters()
        if is_trained(name)
    }


class _Weights(Method):
    """Some of the model's own parameters, as they are."""

    def __init__(
        self, backbone: Backbone, prompts: tuple[str, ...], is_trained: Callable[[str], bool]
    ) -> None:
        tuning = TensorShift(backbone.model, _trained(backbone, is_trained), weights=dict, towers=TOWERS)
        super().__init__(ClipClassifier(backbone, tuning, prompts), tuning)  # type: ignore[arg-type]


class FullTuning(_Weights):
    """Every parameter of both towers except the logit scale, which no method here trains.

    Running statistics of batch norms do not change: the model is in eval mode under every method.
    """

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...]) -> None:
        super().__init__(backbone, prompts, lambda name: name not in ("logit_scale", "logit_bias"))
        # Cut prompts replace the tower's position embeddings, which are trained here.
        self.task.prompts = PromptEncoder(backbone, prompts, cut=False)


class LayerNorms(_Weights):
    """Scale and offset of every layer norm of both towers."""

    def __init__(self, backbone: Backbone, prompts: tuple[str, ...]) -> None:
        norms = tuple(
            f"{name}." for name, module in backbone.model.named_modules() if isinstance(module, nn.LayerNorm)
        )
        super().__init__(backbone, prompts, lambda name: name.startswith(norms))


class Lora(Method):
    """CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv:2405.18541): W0 + B A / sqrt(r) for q, k, v of both towers.

    Each of q, k and v has its own pair, also where the model packs them into one matrix (peft has one pair
    for a packed matrix). Without dropout. The server averages the factors A and B separately.

    Args:
        backbone: It is adapted in place.
        prompts: One a class.
        seed: Of the initial A, which is the same at all sites; B starts at zero.
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
            return {name: _add_blocks(frozen[name], rows) for name, rows in blocks.items()}

        tuning = TensorShift(backbone.model, start, weights=weights, towers=TOWERS)
        super().__init__(ClipClassifier(backbone, tuning, prompts), tuning)  # type: ignore[arg-type]

    def _product(self, tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
        return self._scale * tensors[f"{entry.key}.B"] @ tensors[f"{entry.key}.A"]


class LoraProducts(Lora):
    """As `Lora`, but the server averages the products B A, and truncates their mean to rank r.

    The mean of products is the mean of the sites' models; the product of means is not. The next state is the
    best approximation of rank r, with A's rows of length one (Bai et al. 2024, arXiv:2402.11505).
    """

    def to_vector(self, state: State) -> Vector:
        """Return the products, one after another."""
        parts = [self._product(state, entry).flatten() for entry in self._entries]
        return torch.cat(parts).numpy().astype(np.float64)

    def from_vector(self, vector: Vector) -> State:
        """Return the factors of the best approximation."""
        state, start = dict[str, Tensor](), 0
        for entry in self._entries:
            shape = _rows(entry), self._columns[entry.weight]
            part = torch.from_numpy(vector[start : start + math.prod(shape)].astype(np.float32)).view(shape)
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            state[f"{entry.key}.A"] = vh[: self._rank].contiguous()
            state[f"{entry.key}.B"] = u[:, : self._rank] * s[: self._rank] / self._scale
            start += math.prod(shape)
        return state


def _rows(entry: Entry) -> int:
    return entry.rows[1] - entry.rows[0]


def _add_blocks(weight: Tensor, blocks: list[tuple[Entry, Tensor]]) -> Tensor:
    """Return the weight with products added to its row blocks, in order of their rows."""
    parts, done = [], 0
    for entry, product in blocks:
        low, high = entry.rows
        parts += [weight[done:low], weight[low:high] + product]
        done = high
    return torch.cat([*parts, weight[done:]])
