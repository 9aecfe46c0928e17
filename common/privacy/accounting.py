"""Differential privacy: what a study asks for, and what it costs.

Whose presence is hidden depends on the level: one image, one group of images (a patient), or one site. Two
data sets are neighbours if one of these is replaced by one that adds nothing (zero-out neighbours: Kairouz et
al. 2021, arXiv:2103.00039, section 2), so the number of images is not a secret. Epsilon comes from the
library dp-accounting.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from fedsigma.common.config.schema import ConfigError

__all__ = ["PrivacyEvent", "calibrate_noise_multiplier", "epsilon", "events_within", "sampling_rate"]

# Above this an epsilon means nothing, and the tight bound takes minutes: the quick one will do.
_TIGHT_BELOW = 20.0


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """Noisy sums of clipped vectors: `steps` of them, each of a Poisson sample at `rate` (1: of all)."""

    rate: float
    noise_multiplier: float
    steps: int


def sampling_rate(examples: int, batch_size: int) -> float:
    """The probability with which each image or group is in a step's sample: batch_size images are expected.

    With fewer images than that every step takes all.
    """
    return min(1.0, batch_size / examples)


def epsilon(releases: Iterable[PrivacyEvent], delta: float) -> float:
    """The epsilon of all these releases together, at this delta; 0 for none.

    The tighter of two upper bounds: Renyi divergences (Mironov 2017, arXiv:1702.07476), and up to 20 the
    privacy loss distribution (Doroshenko et al. 2022, arXiv:2207.04380).
    """
    counts: Counter[tuple[float, float]] = Counter()
    for one in releases:
        counts[one.rate, one.noise_multiplier] += one.steps
    return _epsilon(tuple(sorted((*key, steps) for key, steps in counts.items() if steps)), delta)


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not groups:
        return 0.0
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    # It warns of orders that it leaves out, which only loosens the bound.
    logging.getLogger("absl").setLevel(logging.ERROR)
    event = ComposedDpEvent(
        [
            SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
            for rate, noise, steps in groups
        ]
    )
    quick = float(RdpAccountant(neighboring_relation=_zero_out()).compose(event).get_epsilon(delta))
    if quick > _TIGHT_BELOW:
        return quick
    losses = [_privacy_loss(rate, noise).self_compose(steps) for rate, noise, steps in groups]
    return min(quick, float(reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta)))


def _zero_out() -> Any:
    from dp_accounting import NeighboringRelation

    return NeighboringRelation.REPLACE_SPECIAL


# Most of a tight bound's time goes into this distribution, which does not depend on the number of steps.
@lru_cache(maxsize=64)
def _privacy_loss(rate: float, noise_multiplier: float) -> Any:
    """The privacy loss distribution of one release, in steps of 1e-4 as in dp-accounting's PLDAccountant."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=1e-4,
        sampling_prob=rate,
        neighboring_relation=_zero_out(),
    )


def calibrate_noise_multiplier(target: float, *, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier, rounded up to a hundredth, with which so many steps stay within a target.

    Raises:
        ConfigError: none up to a million does.
    """
    low, high = 0, 1
    while _spent(high, delta, rate, steps) > target:
        low, high = high, 2 * high
        if high > 10**8:
            raise ConfigError(f"no noise multiplier keeps {steps} steps within epsilon {target:g}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _spent(middle, delta, rate, steps) > target else (low, middle)
    return high / 100


def _spent(hundredths: int, delta: float, rate: float, steps: int) -> float:
    return epsilon([PrivacyEvent(rate=rate, noise_multiplier=hundredths / 100, steps=steps)], delta)


def events_within(target: float, one: PrivacyEvent, *, delta: float, most: int) -> int:
    """How many releases like this one stay within a target together, at most `most`."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        many = PrivacyEvent(rate=one.rate, noise_multiplier=one.noise_multiplier, steps=one.steps * middle)
        low, high = (middle, high) if epsilon([many], delta) <= target else (low, middle)
    return low
