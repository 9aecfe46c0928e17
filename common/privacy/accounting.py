"""Accounting of differential privacy, by the library dp-accounting.

The level decides whose presence is hidden: one image, one group of images (a patient), or one site. Two data
sets are neighbours if one of these is replaced by one that adds nothing (zero-out neighbours: Kairouz et al.
2021, arXiv:2103.00039, section 2), so the number of images is not a secret.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from fedsigma.common.config.schema import ConfigError

# Above this an epsilon means nothing, and the tight bound takes minutes, so the quick one is used.
_TIGHT_BELOW = 20.0


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """Releases of noisy sums of clipped vectors.

    Attributes:
        rate: probability with which each unit is in a sum's Poisson sample; 1 for sums of all.
        noise_multiplier: standard deviation of the noise, divided by the clipping norm.
        steps: number of sums.
    """

    rate: float
    noise_multiplier: float
    steps: int


def sampling_rate(examples: int, batch_size: int) -> float:
    """The probability with which each image or group is in a step's sample, batch_size on average."""
    return min(1.0, batch_size / examples)


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The epsilon of all these events together, at this delta; 0 for none.

    The tighter of two upper bounds: Renyi divergences (Mironov 2017, arXiv:1702.07476), and up to 20 the
    privacy loss distribution (Doroshenko et al. 2022, arXiv:2207.04380).
    """
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[event.rate, event.noise_multiplier] += event.steps
    return _epsilon(tuple(sorted((*key, steps) for key, steps in counts.items() if steps)), delta)


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not groups:
        return 0.0
    from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    # dp-accounting warns of orders that it leaves out, which only loosens the bound.
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
    """The least noise multiplier, rounded up to a hundredth, that keeps these steps within a target epsilon.

    Raises:
        ConfigError: no multiplier up to a million does.
    """

    def exceeds(hundredths: int) -> bool:
        event = PrivacyEvent(rate=rate, noise_multiplier=hundredths / 100, steps=steps)
        return epsilon([event], delta) > target

    low, high = 0, 1
    while exceeds(high):
        low, high = high, 2 * high
        if high > 10**8:
            raise ConfigError(f"no noise multiplier keeps {steps} steps within epsilon {target:g}")
    return _bisect(low, high, exceeds)[1] / 100


def events_within(target: float, event: PrivacyEvent, *, delta: float, limit: int) -> int:
    """How many events like this one, `limit` at most, stay within a target epsilon together."""

    def is_within(count: int) -> bool:
        return epsilon([replace(event, steps=event.steps * count)], delta) <= target

    return _bisect(0, limit + 1, is_within)[0]


def _bisect(low: int, high: int, is_low: Callable[[int], bool]) -> tuple[int, int]:
    """The last number between low and high that `is_low`, and the next."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high
