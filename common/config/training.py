"""Section `training` of a study, and the learning rate's schedule; imports no torch, to be fast."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.constants import AUGMENTATIONS, OPTIMISERS, PRECISIONS
from fedsigma.common.config.fields import one_of
from fedsigma.common.config.schema import ConfigError, settings

__all__ = ["LocalTrainingConfig", "TrainingConfig", "cosine_decay"]


def cosine_decay(progress: float) -> float:
    """Half a cosine from 1 at progress 0 to 0 at progress 1, and 0 after it."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@settings
class TrainingConfig:
    """How a site trains. The defaults are those of CLIP-SVD's biomedical runs.

    Steps are counted over the whole study. Training outside of rounds always uses AdamW.
    """

    section: ClassVar[str] = "training"

    learning_rate: Annotated[float, Field(ge=1e-9, le=10)] = 0.01
    """Learning rate at the start of the study, after the warm-up."""
    optimiser: Annotated[str, one_of(OPTIMISERS)] = "adamw"
    """adamw, or sgd for plain steps, whose mean over unlike sites is a step on all their images. sgd keeps
    its learning rate; federation.schedule is the server's step's."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Images in a step."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Pull of each singular value to its pretrained one."""
    schedule: Annotated[str, one_of(("cosine", "constant"))] = "cosine"
    """Schedule of the learning rate."""
    final_learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-6
    """Learning rate at the end of the study, for the cosine schedule."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps of linear warm-up at the start of the study."""
    augment: Annotated[str, one_of(AUGMENTATIONS)] = "paper"
    """Augmentation of the training images."""
    proximal: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """FedProx's mu, the pull to the shift that the round began with (Li et al. 2020)."""
    precision: Annotated[str, one_of(PRECISIONS)] = "auto"
    """Number format of the forward pass; auto: bfloat16 where the processor has it."""

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"training.final_learning_rate is {self.final_learning_rate:g}, above training.learning_rate"
                f" ({self.learning_rate:g}): the schedule would rise; set it to the learning rate or below"
            )

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate of a step of the study, 0 <= step < total_steps."""
        if self.optimiser == "sgd":
            return self.learning_rate
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        decay = cosine_decay(progress)
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * decay


@settings
class LocalTrainingConfig(TrainingConfig):
    """How a site trains in a round."""

    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """Steps of one site in one round."""
