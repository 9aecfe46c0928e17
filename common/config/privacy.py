"""The section `privacy` of a study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsigma.common.config.constants import PRIVACY_LEVELS
from fedsigma.common.config.schema import check_choice, check_number

__all__ = ["PrivacyConfig"]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """What a study demands of training, or of the mean.

    Fields: level, `none`, or whose presence is hidden: `image`, `group` (all images of one group of the data
    source, such as a patient) or `site`; noise_multiplier, the noise's standard deviation over the clipping
    norm; clip_norm, the longest gradient of an image or group, or change of a site, that counts in full (L2);
    delta, and epsilon, the budget: what would spend more is refused.
    """

    section: ClassVar[str] = "privacy"

    level: str = "none"
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0
    delta: float = 1e-5
    epsilon: float = 8.0

    def __post_init__(self) -> None:
        check_choice("privacy.level", self.level, PRIVACY_LEVELS)
        check_number("privacy.noise_multiplier", self.noise_multiplier, low=1e-3, high=1e6)
        check_number("privacy.clip_norm", self.clip_norm, low=1e-9, high=1e9)
        check_number("privacy.delta", self.delta, low=1e-15, high=0.1)
        check_number("privacy.epsilon", self.epsilon, low=1e-3, high=1e9)

    @property
    def in_training(self) -> bool:
        """Whether sites clip and add noise in each step of training."""
        return self.level in ("image", "group")

    @property
    def of_sites(self) -> bool:
        """Whether whole changes are clipped, and noise is added to their mean."""
        return self.level == "site"
