"""Section `privacy` of a study."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.constants import PRIVACY_LEVELS
from fedsigma.common.config.fields import one_of
from fedsigma.common.config.schema import settings

__all__ = ["PrivacyConfig"]


@settings
class PrivacyConfig:
    """Differential privacy of training, or of the sites' mean update."""

    section: ClassVar[str] = "privacy"

    level: Annotated[str, one_of(PRIVACY_LEVELS)] = "none"
    """Whose presence is hidden: none, image, group (all images of one group of the data source, such as a
    patient) or site."""
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e6)] = 1.0
    """Standard deviation of the noise divided by the clipping norm."""
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0
    """L2 norm to which the gradient of an image or group, or a site's update, is clipped."""
    delta: Annotated[float, Field(ge=1e-15, le=0.1)] = 1e-5
    """Delta of the guarantee."""
    epsilon: Annotated[float, Field(ge=1e-3, le=1e9)] = 8.0
    """Budget: training that would exceed it is refused."""

    @property
    def in_training(self) -> bool:
        """Whether sites clip and add noise in each step of training."""
        return self.level in ("image", "group")

    @property
    def of_sites(self) -> bool:
        """Whether the sites' updates are clipped, and noise is added to their mean."""
        return self.level == "site"
