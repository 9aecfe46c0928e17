"""Rules between the sections of a study; bounds of single values stand beside their fields."""

from __future__ import annotations

import math

from fedsigma.common.config.federation import MEANS, FederationConfig
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig

__all__ = ["check_study"]


def check_study(
    *,
    baselines: tuple[str, ...],
    evaluate_versions: tuple[str, ...],
    has_data: bool,
    sigma: SigmaConfig,
    personal: PersonalConfig | None,
    federation: FederationConfig,
    privacy: PrivacyConfig,
) -> None:
    """Refuse sections that contradict each other.

    Raises:
        ConfigError: Names the keys and what to change.
    """
    if evaluate_versions and personal is not None:
        raise ConfigError("evaluate_versions evaluates shared values only: leave the section personal out")
    if evaluate_versions and (trained := sorted(set(baselines) - {"zero_shot"})):
        raise ConfigError(
            f"evaluate_versions trains nothing, and baselines has '{trained[0]}', which does: leave it out"
        )
    if personal is not None:
        _check_personal(personal, sigma)
    _check_privacy(privacy, federation)
    if "pooled" in baselines and not has_data:
        raise ConfigError(
            "baselines has 'pooled', but the study has no data section: pooling needs all images in one"
            " place, which only a simulation has; leave 'pooled' out"
        )
    if "local_only" not in baselines:
        return
    if personal is not None:
        raise ConfigError(
            "baselines has 'local_only', which would send each site's personal values to the others: run the"
            " same study without its section personal to compare"
        )
    if federation.masking or privacy.of_sites:
        reason = "federation.masking" if federation.masking else "privacy.level 'site'"
        raise ConfigError(
            "baselines has 'local_only', which would show each site's update to the server and the other"
            f" sites, and {reason} is to hide it: leave it out, or run the same study without {reason}"
        )


def _check_personal(personal: PersonalConfig, sigma: SigmaConfig) -> None:
    """Refuse a personal part that is empty or leaves nothing to share.

    Needs no backbone; `ParameterPartition` checks the layers' numbers.
    """
    if set(personal.towers).isdisjoint(sigma.towers) or set(personal.parts).isdisjoint(sigma.parts):
        raise ConfigError(
            f"personal is {personal}, which is nothing of what sigma adapts, {sigma}: choose some of it,"
            " or leave personal out"
        )
    covers = set(personal.towers) >= set(sigma.towers) and set(personal.parts) >= set(sigma.parts)
    if covers and personal.layers in ("all", sigma.layers):
        raise ConfigError(
            f"personal is {personal}, which is all that sigma adapts, {sigma}, so nothing would be shared:"
            " choose less of it"
        )


def _check_privacy(privacy: PrivacyConfig, federation: FederationConfig) -> None:
    """Refuse a federation that undoes the privacy, or whose aggregation has no accounting."""
    strategy = federation.strategy
    if privacy.in_training and strategy == "qfedavg":
        raise ConfigError(
            f"privacy.level is '{privacy.level}', which hides the sites' losses, and qfedavg needs them: use"
            " another federation.strategy"
        )
    if not privacy.of_sites:
        return
    if strategy not in MEANS:
        raise ConfigError(
            f"privacy.level is 'site', whose noise is calibrated for a mean, and {strategy} takes none: use"
            f" one of {', '.join(MEANS)}"
        )
    if federation.cohorts == "by_images":
        raise ConfigError(
            "privacy.level is 'site', which needs all sites to be sampled alike, and federation.cohorts is"
            " 'by_images': use cohorts: random"
        )
    # Eight standard deviations of a site's share of the noise: of a million values, none exceeds them.
    share = privacy.noise_multiplier / math.sqrt(federation.min_sites)
    needed = privacy.clip_norm * (1 + 8 * share)
    if federation.masking and needed > federation.mask_bound:
        raise ConfigError(
            f"federation.mask_bound is {federation.mask_bound:g}, and noise that hides sites needs"
            f" room up to {needed:.4g}: set it to {needed:.4g} or more, or take a smaller privacy.clip_norm"
        )
