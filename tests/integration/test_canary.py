"""Membership inference against a tiny site that has learned its images by heart, with privacy and without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.privacy.noise import SecureRandom
from fedsigma.common.training.classifier import ClipClassifier
from fedsigma.common.training.dp_sgd import DPSGDGradient
from fedsigma.common.training.loop import evaluate, train
from tests.unit.test_training import task

IMAGES, STEPS = 15, 60
RECIPE = TrainingConfig(
    learning_rate=0.05, batch_size=IMAGES, augment="none", precision="float32", schedule="constant"
)


@dataclass(frozen=True)
class Picture:
    image: Tensor
    label: int


def canaries(seed: int) -> tuple[list[Picture], list[Picture]]:
    """Pictures of noise with labels that have nothing to do with them: each has to be learned by heart.

    The labels go by turns. Drawn at random, members would have more of one class than others, and a model
    that has learned no more than which class is common would already tell the two apart.

    Returns:
        Members, which are trained on, and others of the same distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        Picture(torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8), i % 3)
        for i in range(2 * IMAGES)
    ]
    return drawn[:IMAGES], drawn[IMAGES:]


def losses(job: ClipClassifier, pictures: list[Picture]) -> Tensor:
    found = evaluate(job, pictures, precision="float32")
    return F.nll_loss(found.probabilities.clamp_min(1e-12).log(), found.labels, reduction="none")


def advantage(job: ClipClassifier, privacy: PrivacyConfig | None) -> float:
    """How well an attacker who knows the model tells members from others by their loss.

    The share of members found minus that of others taken for members (Yeom et al. 2018, arXiv:1709.01604), as
    a mean over all thresholds, which is twice the area under the curve minus one, and over several sites.
    """
    found = []
    for seed in range(6):
        members, others = canaries(seed)
        job.sigma.set_shift(torch.zeros(job.sigma.layout.size))
        # The same noise each time the test runs: what is drawn from the operating system is tested elsewhere.
        noise = SecureRandom(bytes([seed]) * 32)
        gradient = DPSGDGradient(job, members, RECIPE, privacy, randomness=noise) if privacy else None
        train(job, members, RECIPE, steps=STEPS, total_steps=STEPS, seed=seed, gradient=gradient)
        inside, outside = losses(job, members), losses(job, others)
        found.append(2 * (inside[:, None] < outside[None]).float().mean().item() - 1)
    return sum(found) / len(found)


def test_an_attacker_finds_members_without_privacy_and_not_with_it(tmp_path: Path) -> None:
    job = task(tmp_path)
    privacy = PrivacyConfig(level="image", noise_multiplier=30.0, clip_norm=1.0)
    spent = epsilon([PrivacyEvent(rate=1.0, noise_multiplier=30.0, steps=STEPS)], 1e-5)
    plain, private = advantage(job, None), advantage(job, privacy)
    print(f"advantage {plain:.2f} without privacy, {private:.2f} with epsilon {spent:.2f}")
    assert plain > 0.8
    # With other noise it scatters around 0.00 by 0.05.
    assert abs(private) < 0.2
