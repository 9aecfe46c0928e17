"""The privacy cost of a study, computed before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.privacy.accounting import (
    PrivacyEvent,
    calibrate_noise_multiplier,
    epsilon,
    events_within,
    sampling_rate,
)

__all__ = ["PrivacyPlan", "check_budget", "privacy_plan", "site_level_epsilon"]


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """The privacy cost of a study.

    Attributes:
        release: The privacy event of one round.
        rounds: Rounds of the study.
        within: Rounds that its budget allows.
        epsilon_after: Epsilon by number of rounds.
        noise_multiplier_for: By epsilon, the noise multiplier with which the whole study stays within it.
    """

    release: PrivacyEvent
    rounds: int
    within: int
    epsilon_after: dict[int, float]
    noise_multiplier_for: dict[float, float]


def _release(study: StudyConfig, units: int) -> PrivacyEvent:
    """The privacy event of one round, at a site with `units` images or groups."""
    privacy = study.privacy
    if privacy.of_sites:
        return PrivacyEvent(rate=1.0, noise_multiplier=privacy.noise_multiplier, steps=1)
    return PrivacyEvent(
        rate=sampling_rate(units, study.training.batch_size),
        noise_multiplier=privacy.noise_multiplier,
        steps=study.training.local_steps,
    )


def privacy_plan(study: StudyConfig, *, images: int, targets: Sequence[float] = (1, 2, 4, 8)) -> PrivacyPlan:
    """Compute the privacy cost of a study for a site with `images` training images or groups.

    Args:
        study: The study.
        images: Training images (or groups) of the site.
        targets: Epsilons for which noise multipliers are computed.

    Raises:
        ConfigError: The study has no differential privacy.
    """
    privacy, rounds = study.privacy, study.federation.rounds
    if privacy.level == "none":
        raise ConfigError(
            f"study '{study.name}' has no privacy: give it a section privacy, with level image, group or site"
        )
    release = _release(study, images)
    marks = sorted({1, max(1, rounds // 4), max(1, rounds // 2), rounds})
    return PrivacyPlan(
        release=release,
        rounds=rounds,
        within=events_within(privacy.epsilon, release, delta=privacy.delta, limit=rounds),
        epsilon_after={count: epsilon([release] * count, privacy.delta) for count in marks},
        noise_multiplier_for={
            float(target): calibrate_noise_multiplier(
                target, delta=privacy.delta, rate=release.rate, steps=release.steps * rounds
            )
            for target in targets
        },
    )


def site_level_epsilon(study: StudyConfig, rounds: int) -> float:
    """Epsilon after `rounds` rounds of a study that protects whole sites."""
    return epsilon([_release(study, 1)] * rounds, study.privacy.delta)


def check_budget(study: StudyConfig) -> None:
    """Check that a study which protects whole sites stays within its privacy budget.

    Every site is in every round, so the cost is known before the study starts. Where training protects
    images, the cost depends on how many a site has, and the sites' own ledgers enforce the budget.

    Raises:
        ConfigError: The rounds of the study exceed the budget.
    """
    privacy, rounds = study.privacy, study.federation.rounds
    if privacy.of_sites and (cost := site_level_epsilon(study, rounds)) > privacy.epsilon:
        enough = calibrate_noise_multiplier(privacy.epsilon, delta=privacy.delta, rate=1.0, steps=rounds)
        raise ConfigError(
            f"{rounds} rounds with a noise multiplier of {privacy.noise_multiplier:g} use epsilon"
            f" {cost:.2f}, privacy.epsilon is {privacy.epsilon:g}: raise privacy.noise_multiplier to"
            f" {enough:g}, take fewer rounds, or allow more"
        )
