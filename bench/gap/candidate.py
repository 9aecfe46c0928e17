"""A candidate: its settings, and its server optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsigma.common.config.training import cosine_decay
from fedsigma.common.sigma import Layout


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train. The defaults are the recipe of the two studies.

    Attributes:
        local_steps: Steps of a site in a round; the number of rounds follows from all steps.
        optimiser: At the sites: `adamw`, with a new state each round, or `sgd`.
        learning_rate: At the sites; it follows the cosine schedule unless `constant_rate`.
        constant_rate: Whether the sites' rate is constant; then the server's step follows the schedule.
        server_optimiser: `momentum` (FedAvgM), `adam` or `yogi` (FedOpt, Reddi et al. 2021), or `matrix`
            (momentum, with each matrix's step scaled to one root mean square).
        eta: Step of the server's optimiser.
        beta1: Its momentum.
        beta2: Its decay of squares.
        tau: Its offset of the root.
        logit_adjustment: Factor of the log of the site's class shares, which is added to the logits in
            training (Menon et al. 2021).
        pseudo_count: Count added to each class before its share.
        absent_scale: Factor of the logits of classes that the site lacks, as in FedRS (Li & Zhan 2021).
        distillation: Weight of the divergence from the zero-shot model over absent classes.
        not_true_distillation: Weight of FedNTD's divergence (Lee et al. 2022) from the round's first model.
        proximal: FedProx's mu.
        control_variates: Whether sites use SCAFFOLD's control variates.
        client_momentum: FedCM's share of the last global update in a local step (Xu et al. 2021).
        spectrum_power: Exponent of s / mean s, which scales the step along each singular direction.
        frozen_text: Whether the text tower stays pretrained.
        equal_weights: Whether all sites have the same weight.
        cohort_size: Sites of a round, which take turns in changing order; 0: all.
        by_images: Whether sites are sampled in proportion to their images, with equal weights.
    """

    local_steps: int = 2
    optimiser: str = "adamw"
    learning_rate: float = 0.04
    constant_rate: bool = False
    server_optimiser: str = "momentum"
    eta: float = 1.0
    beta1: float = 0.8
    beta2: float = 0.99
    tau: float = 1e-8
    logit_adjustment: float = 0.0
    pseudo_count: float = 1.0
    absent_scale: float = 1.0
    distillation: float = 0.0
    not_true_distillation: float = 0.0
    proximal: float = 0.0
    control_variates: bool = False
    client_momentum: float = 0.0
    spectrum_power: float = 0.0
    frozen_text: bool = False
    equal_weights: bool = False
    cohort_size: int = 0
    by_images: bool = False

    @property
    def is_one_gradient(self) -> bool:
        """Whether the mean of the sites' updates is one gradient, taken at one point."""
        return self.optimiser == "sgd" and self.local_steps == 1 and not self.control_variates

    @property
    def changes_loss(self) -> bool:
        """Whether a site's loss is not plain cross-entropy."""
        weights = (self.logit_adjustment, self.distillation, self.not_true_distillation)
        return any(weights) or self.absent_scale != 1.0


def matrix_slices(layout: Layout) -> list[slice]:
    """Return the positions of each matrix's values."""
    return [slice(e.offset, e.offset + e.size) for e in layout.entries]


def image_tower_mask(layout: Layout) -> Tensor:
    """Return one for values of the image tower, else zero (values,)."""
    return torch.cat([torch.full((e.size,), float(e.tower == "image")) for e in layout.entries])


def spectrum_factors(layout: Layout, singular_values: list[Tensor], power: float) -> Tensor:
    """Return (s / mean s) ** power of each singular direction, with the mean of its matrix (values,)."""
    factors = torch.ones(layout.size)
    for part, s in zip(matrix_slices(layout), singular_values, strict=True):
        factors[part] = (s / s.mean()).clamp_min(1e-6) ** power
    return factors


@dataclass
class ServerStep:
    """A candidate's server optimiser.

    Attributes:
        candidate: The candidate.
        factors: Factor of each value's step (values,).
        matrices: Positions of each matrix's values.
        state: State of the optimiser.
    """

    candidate: Candidate
    factors: Tensor
    matrices: list[slice]
    state: dict[str, Any] = field(default_factory=dict)

    def step(self, mean: Tensor, number: int, rounds: int) -> Tensor:
        """Return the shift's update in round `number`, from 1, given the sites' mean update (values,)."""
        c = self.candidate
        fade = cosine_decay((number - 1) / rounds) if c.constant_rate else 1.0
        first = self.state.get("first", torch.zeros_like(mean))
        if c.server_optimiser in ("momentum", "matrix"):
            first = self.state["first"] = c.beta1 * first + mean
            if c.server_optimiser == "matrix":
                first = first.clone()
                for part in self.matrices:
                    first[part] /= first[part].square().mean().sqrt().clamp_min(1e-12)
            return c.eta * fade * self.factors * first
        second = self.state.get("second", torch.zeros_like(mean))
        first = c.beta1 * first + (1 - c.beta1) * mean
        square = mean.square()
        if c.server_optimiser == "yogi":
            second = second - (1 - c.beta2) * square * torch.sign(second - square)
            correction = 1.0
        else:
            second = c.beta2 * second + (1 - c.beta2) * square
            # As in Flower's FedAdam, whose count starts at two.
            correction = math.sqrt(1 - c.beta2 ** (number + 1)) / (1 - c.beta1 ** (number + 1))
        self.state |= {"first": first, "second": second}
        return c.eta * fade * correction * self.factors * first / (second.sqrt() + c.tau)
