"""Local training and evaluation: plain functions of tensors, independent of the federation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

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
    of the whole batch, but the activations of one part only are in memory.

    Args:
        classifier: its shift is trained.
        images: uint8 (n, 3, size, size), n > 0.
        labels: class numbers (n,).
        precision: "auto", "float32" or "bfloat16".

    Returns:
        The mean cross-entropy, which may be infinite or nan.
    """
    total = 0.0
    with (
        classifier.sigma.accumulate_gradients(),
        training_attention(classifier.backbone.model, precision, classifier.device),
    ):
        with autocast(precision, classifier.device):
            text = classifier.text_features()
        leaf = text.detach().requires_grad_(text.requires_grad)
        for part, part_labels in classifier.micro_batches(images, labels):
            with autocast(precision, classifier.device):
                logits = classifier.logits(classifier.image_features(part), leaf)
            loss = F.cross_entropy(logits, part_labels) * (len(part) / len(images))
            torch.autograd.backward(loss)
            total += loss.item()
        if leaf.grad is not None:
            torch.autograd.backward(text, leaf.grad)
    return total


GradientStep = Callable[[], float]
"""Adds the gradient of one step to that of the classifier's shift, and returns the step's loss."""


def batch_gradient(
    classifier: ClipClassifier, examples: Sequence[Example], config: TrainingConfig, *, seed: int
) -> GradientStep:
    """Steps over augmented batches of shuffled epochs; a loss that is not finite is a TrainingError."""
    augment = build_augmentation(classifier, config)
    labels = torch.tensor([e.label for e in examples])
    batches = endless_batches(len(examples), config.batch_size, seed)

    def gradient() -> float:
        batch = next(batches)
        images = torch.stack([augment(examples[i].image) for i in batch])
        loss = accumulate_gradient(classifier, images, labels[batch], precision=config.precision)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss}: lower the learning rate (now {config.learning_rate}) or set precision"
                " to float32"
            )
        return loss

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
) -> float:
    """Train the classifier's shift in place, on the cross-entropy of cosine similarities.

    Args:
        classifier: has the shift to start from.
        examples: at least one; some classes may be missing.
        config: settings of the optimiser.
        first_step: number of this call's first step within the study, for the schedule.
        steps: number of steps.
        total_steps: number of steps of the whole study.
        seed: of batches and augmentation; the same seed and first step give the same result.
        progress: show a progress bar.
        gradient: adds the gradient of a step; `batch_gradient` by default.

    Returns:
        The mean of the steps' losses.

    Raises:
        TrainingError: there is no example, or a loss is not finite.
    """
    if not examples:
        raise TrainingError("no training example: the site has no labelled image of the study's classes")
    if gradient is None:
        gradient = batch_gradient(classifier, examples, config, seed=seed + first_step)
    shift, start = classifier.sigma.shift, classifier.sigma.shift.detach().clone()
    optimiser = _OPTIMISERS[config.optimiser](
        [shift], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    total = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + first_step)
        for step in track(range(steps), "training", disable=not progress):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate_at(first_step + step, total_steps)
            optimiser.zero_grad(set_to_none=True)
            total += gradient()
            if config.proximal:
                torch.autograd.backward(0.5 * config.proximal * (shift - start).square().sum())
            optimiser.step()
    return total / max(1, steps)


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
        TrainingError: a probability is nan, because the shift has diverged.
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
            f"a probability is not finite: the shift has diverged (largest value {largest:.3g}); "
            "train again with a lower learning rate or set precision to float32"
        )
    return Predictions(probabilities, labels)
