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

    strategy: Annotated[
        str, one_of(STRATEGIES), Field(description="How the server aggregates the sites' updates.")
    ] = "fedavg"
    schedule: Annotated[
        str,
        one_of(("cosine", "constant")),
        Field(description="Decay of the server's step over the rounds, for fedavgm, fedadam and fedyogi."),
    ] = "constant"
    rounds: Annotated[int, Field(ge=1, le=100_000, description="Number of rounds.")] = 10
    participation: Annotated[
        float, Field(ge=1e-6, le=1, description="Share of the available sites that is sampled in each round.")
    ] = 1.0
    cohorts: Annotated[
        str,
        one_of(("random", "by_images")),
        Field(
            description="How sites are sampled: random, or by_images, in proportion to their training images."
        ),
    ] = "random"
    min_sites: Annotated[
        int, Field(ge=1, le=100_000, description="Fewest valid replies for a round to count.")
    ] = 2
    round_timeout_s: Annotated[
        float, Field(ge=1, le=43_200, description="Seconds that the server waits for the replies of a round.")
    ] = 600.0
    wait_for_sites_s: Annotated[
        float, Field(ge=0, le=604_800, description="Seconds that the server waits for min_sites to connect.")
    ] = 300.0
    evaluate_every: Annotated[
        int,
        Field(
            ge=1,
            le=100_000,
            description="Evaluate the incoming shift every n-th round; the final shift is always evaluated.",
        ),
    ] = 1
    options: Annotated[
        dict[str, Any], Field(description="Options of the strategy, such as eta of fedadam.")
    ] = field(default_factory=dict)
    codec: Annotated[
        str, one_of(CODECS), Field(description="How sites encode their updates: exact, half, int8 or small.")
    ] = "exact"
    norm_bound: Annotated[
        float | None, Field(ge=1e-12, description="Largest L2 norm of an update that is accepted; null: any.")
    ] = None
    norm_factor: Annotated[
        float | None,
        Field(
            ge=1,
            description="Largest L2 norm of an update, in multiples of the round's median, where three or"
            " more sites reply; null: any.",
        ),
    ] = 10.0
    masking: Annotated[
        bool, Field(description="Secure aggregation: the server learns only the sum of the updates.")
    ] = False
    mask_bound: Annotated[
        float, Field(ge=1e-6, le=1e6, description="Largest magnitude of a value in a masked update.")
    ] = 16.0
    max_examples: Annotated[
        int | None, Field(ge=1, description="Most examples that a site is weighted by; null: no limit.")
    ] = None

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
