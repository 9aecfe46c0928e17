"""What a study's privacy costs, reckoned before it runs."""

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
    """What a study spends.

    Fields: release, one round's; rounds, how many the study has, and within, how many its budget allows;
    spent, the epsilon after some rounds; noise_for, the noise multipliers that keep the whole study within
    some epsilons.
    """

    release: PrivacyEvent
    rounds: int
    within: int
    epsilon_after: dict[int, float]
    noise_multiplier_for: dict[float, float]


def _release(study: StudyConfig, units: int) -> PrivacyEvent:
    """One round's, at a site of so many images (or groups of one image each)."""
    privacy = study.privacy
    if privacy.of_sites:
        return PrivacyEvent(rate=1.0, noise_multiplier=privacy.noise_multiplier, steps=1)
    return PrivacyEvent(
        rate=sampling_rate(units, study.training.batch_size),
        noise_multiplier=privacy.noise_multiplier,
        steps=study.training.local_steps,
    )


def _after(study: StudyConfig, one: PrivacyEvent, rounds: int) -> float:
    many = PrivacyEvent(rate=one.rate, noise_multiplier=one.noise_multiplier, steps=one.steps * rounds)
    return epsilon([many], study.privacy.delta)


def privacy_plan(study: StudyConfig, *, images: int, targets: Sequence[float] = (1, 2, 4, 8)) -> PrivacyPlan:
    """What the study spends of a site with so many training images.

    Raises:
        ConfigError: the study has no privacy.
    """
    if study.privacy.level == "none":
        raise ConfigError(
            f"study '{study.name}' has no privacy: give it a section privacy, with level image, group or site"
        )
    one, rounds = _release(study, images), study.federation.rounds
    marks = sorted({1, max(1, rounds // 4), max(1, rounds // 2), rounds})
    delta = study.privacy.delta
    return PrivacyPlan(
        release=one,
        rounds=rounds,
        within=events_within(study.privacy.epsilon, one, delta=delta, most=rounds),
        epsilon_after={after: _after(study, one, after) for after in marks},
        noise_multiplier_for={
            float(t): calibrate_noise_multiplier(t, delta=delta, rate=one.rate, steps=one.steps * rounds)
            for t in targets
        },
    )


def site_level_epsilon(study: StudyConfig, rounds: int) -> float:
    """The epsilon of so many rounds of a study that hides sites."""
    return _after(study, _release(study, 1), rounds)


def check_budget(study: StudyConfig) -> None:
    """Refuse a study that hides sites and would spend more than its budget.

    Every site is in every round, so the whole cost is known beforehand. Where training hides images it
    depends on how many a site has, and the sites' own ledgers see to it.

    Raises:
        ConfigError: its rounds spend more.
    """
    privacy, rounds = study.privacy, study.federation.rounds
    if not privacy.of_sites:
        return
    spent = site_level_epsilon(study, rounds)
    if spent > privacy.epsilon:
        enough = calibrate_noise_multiplier(privacy.epsilon, delta=privacy.delta, rate=1.0, steps=rounds)
        raise ConfigError(
            f"{rounds} rounds with a noise multiplier of {privacy.noise_multiplier:g} spend epsilon"
            f" {spent:.2f}, privacy.epsilon is {privacy.epsilon:g}: raise privacy.noise_multiplier to"
            f" {enough:g}, take fewer rounds, or allow more"
        )
