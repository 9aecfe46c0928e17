"""Local training and evaluation: plain functions of tensors, independent of the federation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fedsigma.common.config.constants import OPTIMISERS
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.training.attention import training_attention
from fedsigma.common.training.augment import build_augmentation
from fedsigma.common.training.classifier import ClipClassifier, Example, TrainingError, autocast
from fedsigma.common.training.metrics import Predictions


@dataclass(frozen=True)
class TrainResult:
    """Summary of one call of `train`.

    Attributes:
        loss: mean cross-entropy over the steps; nan where training is private.
        steps: number of steps.
        examples: number of training examples.
    """

    loss: float
    steps: int
    examples: int


_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = dict(
    zip(OPTIMISERS, (torch.optim.AdamW, torch.optim.SGD), strict=True)
)


def endless_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless epochs in new orders; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]


def accumulate_gradient(
    classifier: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> float:
    """Add the gradient of a batch's mean cross-entropy to that of the classifier's shift.

    The images go through the model `classifier.micro_batch` at a time, the prompts once: the gradient is that
    of the whole batch, but the activations of one part only are held.

    Args:
        classifier: its shift is trained.
        images: uint8 (n, 3, size, size), n > 0.
        labels: class numbers (n,).
        precision: "auto", "float32" or "bfloat16".

    Returns:
        The mean cross-entropy over the batch; it may be infinite or not a number.
    """
    total = 0.0
    with (
        classifier.sigma.accumulate_gradients(),
        training_attention(classifier.backbone.model, precision, classifier.device),
    ):
        with autocast(precision, classifier.device):
            text = classifier.text_features()
        leaf = text.detach().requires_grad_(text.requires_grad)
        for part, truth in zip(
            images.split(classifier.micro_batch), labels.split(classifier.micro_batch), strict=True
        ):
            with autocast(precision, classifier.device):
                logits = classifier.logits(classifier.image_features(part), leaf)
            loss = F.cross_entropy(logits, truth.to(classifier.device)) * (len(part) / len(images))
            loss.backward()
            total += loss.item()
        if leaf.grad is not None:
            text.backward(leaf.grad)
    return total


GradientStep = Callable[[], float]
"""Adds the gradient of one step to that of the classifier's shift, and returns the step's loss."""


def batch_gradient(
    classifier: ClipClassifier, examples: Sequence[Example], config: TrainingConfig, *, seed: int
) -> GradientStep:
    """The gradient of one batch after another: of epochs in new orders, augmented by torch's generator.

    Its calls raise:
        TrainingError: the loss is not finite.
    """
    augment = build_augmentation(classifier, config)
    labels = torch.tensor([e.label for e in examples])
    batches = endless_batches(len(examples), config.batch_size, seed)

    def gradient() -> float:
        chosen = next(batches)
        images = torch.stack([augment(examples[i].image) for i in chosen])
        value = accumulate_gradient(classifier, images, labels[chosen], precision=config.precision)
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value}: lower the learning rate (now {config.learning_rate}) or set precision"
                " to float32"
            )
        return value

    return gradient


def train(
    classifier: ClipClassifier,
    examples: Sequence[Example],
    config: TrainingConfig,
    *,
    first_step: int = 0,
    steps: int,
    total_steps: int,
    seed: int,
    progress: bool = False,
    gradient: GradientStep | None = None,
) -> TrainResult:
    """Train the classifier's shift in place: the recipe's optimiser on the cross-entropy of cosine
    similarities.

    Args:
        classifier: has the shift to start from.
        examples: at least one; some classes may be missing.
        config: optimiser settings.
        first_step: number of this call's first step within the study, for the schedule.
        steps: steps to make.
        total_steps: of the whole study.
        seed: of batches and augmentation; the same seed and first step give the same result.
        progress: show a bar.
        gradient: of one step; `batch_gradient` by default.

    Raises:
        TrainingError: no example, an unknown augmentation, or a loss that is not finite.
    """
    if not examples:
        raise TrainingError("no training example: the site has no labelled image of the study's classes")
    if gradient is None:
        gradient = batch_gradient(classifier, examples, config, seed=seed + first_step)
    shift, start = classifier.sigma.shift, classifier.sigma.shift.detach().clone()
    kind = _OPTIMISERS[config.optimiser]
    optimiser = kind([shift], lr=config.learning_rate, weight_decay=config.weight_decay)
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + first_step)
        for step in track(range(steps), "training", disable=not progress):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate_at(first_step + step, total_steps)
            optimiser.zero_grad(set_to_none=True)
            total += gradient()
            if config.proximal:
                (0.5 * config.proximal * (shift - start).square().sum()).backward()
            optimiser.step()
    return TrainResult(total / max(1, steps), steps, len(examples))


def evaluate(
    classifier: ClipClassifier,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    precision: str = "auto",
    progress: bool = False,
) -> Predictions:
    """Class probabilities of every example under the classifier's shift.

    Raises:
        TrainingError: a probability is not a number, as where the shift has diverged.
    """
    labels = torch.tensor([e.label for e in examples], dtype=torch.long)
    parts = []
    with classifier.sigma.inference_mode(), autocast(precision, classifier.device):
        text = classifier.text_features()
        for start in track(range(0, len(examples), batch_size), "evaluating", disable=not progress):
            images = torch.stack([classifier.resize(e) for e in examples[start : start + batch_size]])
            logits = classifier.logits(classifier.image_features(images), text)
            parts.append(logits.softmax(1).cpu())
    probabilities = torch.cat(parts) if parts else torch.zeros(0, classifier.class_count)
    if not probabilities.isfinite().all():
        largest = classifier.sigma.shift.detach().abs().max().item()
        raise TrainingError(
            f"no finite probability comes out: the shift has diverged (largest value {largest:.3g}); "
            "train again with a lower learning rate or set precision to float32"
        )
    return Predictions(probabilities, labels)
