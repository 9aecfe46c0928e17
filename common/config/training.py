"""The settings of local training and their schedule; needs no torch, so that settings are read quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine_decay(done: float) -> float:
    """Half a cosine from 1 to 0, and 0 after that; done: the share of the way, from 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a site trains. The defaults are those of CLIP-SVD's biomedical runs.

    learning_rate, final_learning_rate: of the steps, at the start and the end of the whole study.
    optimiser: "adamw", or "sgd" for plain steps, whose mean over unlike sites is a step on all their images,
    which that of AdamW's is not. They keep the learning rate of the start: how far the model goes is for the
    server to say (`federation.schedule`). Training that is not part of a round takes AdamW.
    schedule: "cosine" or "constant", counted in steps over the whole study.
    warmup_steps: linear, at the start of the study.
    weight_decay: pulls the shift, and so each singular value to its pretrained one.
    augment: one of `names.AUGMENTATIONS`.
    proximal: FedProx's mu, the pull to the shift that the round began with (Li et al. 2020, eq. 2).
    precision: "auto" takes bfloat16 where the processor computes in it.
    """

    learning_rate: float = 0.01
    optimiser: str = "adamw"
    batch_size: int = 32
    weight_decay: float = 0.0
    schedule: str = "cosine"
    final_learning_rate: float = 1e-6
    warmup_steps: int = 0
    augment: str = "paper"
    proximal: float = 0.0
    precision: str = "auto"

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of step 0 <= step < total_steps of the study."""
        if self.optimiser == "sgd":
            return self.learning_rate
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine_decay(done)
