"""A candidate as a handful of settings, and what the server does with the sites' mean under it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsigma.common.config.training import cosine_decay
from fedsigma.common.sigma import Layout

__all__ = ["Server", "Way", "direction_factors", "image_tower", "matrices"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train. The defaults are the recipe of the two studies.

    steps: of a site in a round; there are as many rounds as make the same number in all. optimiser: `adamw`
    (state new each round) or `sgd` at the sites. rate: at the sites; it follows the cosine schedule unless
    `flat`.
    server: `momentum` (FedAvgM, beta1 its momentum, eta its step), `adam`, `yogi` (FedOpt, Reddi et al. 2021;
    eta follows the cosine schedule where `flat`) or `matrix` (momentum, each matrix's step brought to one
    root mean square).
    adjust: times the log of the site's own class shares is added to the logits in training (Menon et al.
    2021); pseudo: counts added to each class before. absent: as FedRS (Li & Zhan 2021), logits of classes
    that the site lacks are scaled by this. distil: weight of the divergence from the zero-shot model over
    absent classes. not_true: of FedNTD's (Lee et al. 2022), whose teacher is the round's first model.
    proximal: FedProx's mu. control: SCAFFOLD's control variates. client_momentum: FedCM's share of the last
    global change in a local step (Xu et al. 2021), 0 none. power: steps times (s / mean s)**power along a
    singular direction. frozen_text: the text tower stays as it came. equal: sites count alike. at_once: sites
    in a round, which take turns in new orders, in as many rounds more; 0 all. by_images: a site has turns in
    proportion to its images, as many in all, and each turn counts alike.
    """

    steps: int = 2
    optimiser: str = "adamw"
    rate: float = 0.04
    flat: bool = False
    server: str = "momentum"
    eta: float = 1.0
    beta1: float = 0.8
    beta2: float = 0.99
    tau: float = 1e-8
    adjust: float = 0.0
    pseudo: float = 1.0
    absent: float = 1.0
    distil: float = 0.0
    not_true: float = 0.0
    proximal: float = 0.0
    control: bool = False
    client_momentum: float = 0.0
    power: float = 0.0
    frozen_text: bool = False
    equal: bool = False
    at_once: int = 0
    by_images: bool = False

    @property
    def one_gradient(self) -> bool:
        """Whether the mean of the sites' changes is one gradient, taken at one point."""
        return self.optimiser == "sgd" and self.steps == 1 and not self.control

    @property
    def changes_loss(self) -> bool:
        """Whether a site's loss is other than plain cross-entropy."""
        return bool(self.adjust or self.absent != 1.0 or self.distil or self.not_true)


def matrices(layout: Layout) -> list[slice]:
    """Where each matrix's values are."""
    return [slice(e.offset, e.offset + e.size) for e in layout.entries]


def image_tower(layout: Layout) -> Tensor:
    """One for values of the image tower, else zero (values,)."""
    found = torch.zeros(layout.size)
    for entry in layout.entries:
        if entry.tower == "image":
            found[entry.offset : entry.offset + entry.size] = 1
    return found


def direction_factors(layout: Layout, values: list[Tensor], power: float) -> Tensor:
    """(s / mean s) ** power of each singular direction, mean by matrix (values,)."""
    found = torch.ones(layout.size)
    for part, s in zip(matrices(layout), values, strict=True):
        found[part] = (s / s.mean()).clamp_min(1e-6) ** power
    return found


@dataclass
class Server:
    """What the server does with the mean change of a round.

    Args:
        way: how. factors: of each value's step (values,). parts: of the matrices.
    """

    way: Way
    factors: Tensor
    parts: list[slice]
    state: dict[str, Any] = field(default_factory=dict)

    def step(self, mean: Tensor, number: int, rounds: int) -> Tensor:
        """The change of the model in round `number` from 1, given the sites' mean change (values,)."""
        way = self.way
        fade = cosine_decay((number - 1) / rounds) if way.flat else 1.0
        first = self.state.get("first", torch.zeros_like(mean))
        if way.server in ("momentum", "matrix"):
            first = self.state["first"] = way.beta1 * first + mean
            if way.server == "matrix":
                first = first.clone()
                for part in self.parts:
                    first[part] /= first[part].square().mean().sqrt().clamp_min(1e-12)
            return way.eta * fade * self.factors * first
        second = self.state.get("second", torch.zeros_like(mean))
        first = way.beta1 * first + (1 - way.beta1) * mean
        square = mean.square()
        if way.server == "yogi":
            second = second - (1 - way.beta2) * square * torch.sign(second - square)
            correct = 1.0
        else:
            second = way.beta2 * second + (1 - way.beta2) * square
            # As in flwr's FedAdam, whose count begins at two.
            correct = math.sqrt(1 - way.beta2 ** (number + 1)) / (1 - way.beta1 ** (number + 1))
        self.state |= {"first": first, "second": second}
        return way.eta * fade * correct * self.factors * first / (second.sqrt() + way.tau)
