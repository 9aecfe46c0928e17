"""Section `federation` of a study."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fedsigma.common.config.constants import CODECS
from fedsigma.common.config.fields import one_of
from fedsigma.common.config.schema import ConfigError, settings

__all__ = ["MEANS", "STEPS", "STRATEGIES", "FederationConfig"]

STRATEGIES = (
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "qfedavg",
)
MEANS = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi")
"""The strategies that need only the weighted mean of the updates."""
STEPS = {"fedavgm": "server_learning_rate", "fedadam": "eta", "fedyogi": "eta"}
"""The strategies with a server step, and the option that is its size."""


@settings
class FederationConfig:
    """How the server and the sites work together."""

    section: ClassVar[str] = "federation"

    strategy: Annotated[str, one_of(STRATEGIES)] = "fedavg"
    """How the server aggregates the sites' updates."""
    schedule: Annotated[str, one_of(("cosine", "constant"))] = "constant"
    """Decay of the server's step over the rounds, for fedavgm, fedadam and fedyogi."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Number of rounds."""
    participation: Annotated[float, Field(ge=1e-6, le=1)] = 1.0
    """Share of the available sites that is sampled in each round."""
    cohorts: Annotated[str, one_of(("random", "by_images"))] = "random"
    """How sites are sampled: random, or by_images, in proportion to their training images."""
    min_sites: Annotated[int, Field(ge=1, le=100_000)] = 2
    """Fewest valid replies for a round to count."""
    round_timeout_s: Annotated[float, Field(ge=1, le=43_200)] = 600.0
    """Seconds that the server waits for the replies of a round."""
    wait_for_sites_s: Annotated[float, Field(ge=0, le=604_800)] = 300.0
    """Seconds that the server waits for min_sites to connect."""
    evaluate_every: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Evaluate the incoming shift every n-th round; the final shift is always evaluated."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the strategy, such as eta of fedadam."""
    codec: Annotated[str, one_of(CODECS)] = "exact"
    """How sites encode their updates: exact, half, int8 or small."""
    norm_bound: Annotated[float | None, Field(ge=1e-12)] = None
    """Largest L2 norm of an update that is accepted; null: any."""
    norm_factor: Annotated[float | None, Field(ge=1)] = 10.0
    """Largest L2 norm of an update, in multiples of the round's median, where three or more sites reply;
    null: any."""
    masking: bool = False
    """Secure aggregation: the server learns only the sum of the updates."""
    mask_bound: Annotated[float, Field(ge=1e-6, le=1e6)] = 16.0
    """Largest magnitude of a value in a masked update."""
    max_examples: Annotated[int | None, Field(ge=1)] = None
    """Most examples that a site is weighted by; null: no limit."""

    def __post_init__(self) -> None:
        if self.schedule != "constant" and self.strategy not in STEPS:
            raise ConfigError(
                f"federation.schedule is '{self.schedule}', and {self.strategy} has no step of its own: use"
                f" one of {', '.join(STEPS)}, or schedule: constant"
            )
        if self.cohorts == "by_images" and (self.participation == 1 or self.masking):
            raise ConfigError(
                "federation.cohorts is 'by_images', which samples a share of the sites by their reported"
                " numbers of images: set participation below 1 and masking: false, or cohorts: random"
            )
        if self.cohorts == "by_images" and self.strategy not in MEANS:
            raise ConfigError(
                f"federation.cohorts is 'by_images', which weights the sites' updates, and {self.strategy}"
                f" takes no weighted mean: use one of {', '.join(MEANS)}, or cohorts: random"
            )
        if self.masking and self.strategy not in MEANS:
            raise ConfigError(
                f"federation.masking shows the server only the sum, and {self.strategy} needs each site's"
                f" update: use one of {', '.join(MEANS)}, or masking: false"
            )
