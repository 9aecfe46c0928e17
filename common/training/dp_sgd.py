"""Differentially private training: DP-SGD on the sigma shift, which hides an image or a group of images.

Each step takes a Poisson sample, clips the gradient of each image or group, and adds Gaussian noise to their
sum (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.privacy.accounting import sampling_rate
from fedsigma.common.privacy.noise import SecureRandom
from fedsigma.common.sigma import PerSampleUnsupported
from fedsigma.common.training.attention import training_attention
from fedsigma.common.training.augment import build_augmentation
from fedsigma.common.training.classifier import ClipClassifier, Example, TrainingError, autocast
from fedsigma.common.training.loop import accumulate_gradient

__all__ = ["DPSGDGradient", "clipped_sum", "per_sample_gradients", "privacy_units"]

log = logging.getLogger("fedsigma.private")
# Rounding in bfloat16 moves a gradient by a few hundredths of its length; mixing examples, by all of it.
_TOLERANCE = 0.2


def privacy_units(examples: Sequence[Example], level: str) -> list[list[int]]:
    """The positions in `examples` of each image, or of each group at the level `group`.

    Raises:
        TrainingError: the level is `group`, and an example has no group.
    """
    if level == "image":
        return [[i] for i in range(len(examples))]
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        group = getattr(example, "group", None)
        if group is None:
            raise TrainingError(
                "privacy.level is 'group', and an image has no group: set the data source's group column,"
                " or hide single images with level: image"
            )
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def clipped_sum(gradients: Tensor, norm: float) -> Tensor:
    """Sum gradients (n, values), each clipped to an L2 norm of at most `norm`: (values,), float32.

    A gradient that is not finite adds nothing. The norm is lowered by a millionth, so that rounding cannot
    exceed it.
    """
    lengths = gradients.norm(dim=1)
    norm *= 1 - 1e-6
    factors = (norm / lengths.clamp_min(norm)).nan_to_num(0.0, 0.0, 0.0)
    finite = torch.isfinite(lengths)
    total: Tensor = factors[finite] @ gradients[finite]
    return total


def per_sample_gradients(
    classifier: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> Iterator[Tensor]:
    """Yield the gradients (m, shift size) of each example's cross-entropy, a micro-batch at a time.

    Each example has its own copy of the prompts in the text tower, since shared ones would mix the examples'
    gradients. So the text tower costs as much as for images times classes prompts. Arguments are as of
    `accumulate_gradient`.

    Raises:
        PerSampleUnsupported: the model does not support it; `sequential_gradients` works for any model.
    """
    model, device = classifier.backbone.model, classifier.device
    with (
        classifier.sigma.per_sample_gradients() as per_sample,
        training_attention(model, precision, device, per_sample.project),
    ):
        for part, part_labels in classifier.micro_batches(images, labels):
            per_sample.start(len(part))
            with autocast(precision, device):
                image, text = classifier.image_features(part), classifier.text_features(len(part))
                compute_logits = classifier.logits if text.ndim == 2 else classifier.per_example_logits
                logits = compute_logits(image, text)
            torch.autograd.backward(F.cross_entropy(logits, part_labels, reduction="sum"))
            yield per_sample.gradients()


def sequential_gradients(
    classifier: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> Iterator[Tensor]:
    """As `per_sample_gradients`, with one backward pass for each example: slow, and exact for any model."""
    shift = classifier.sigma.shift
    previous, shift.grad = shift.grad, None
    try:
        for image, label in zip(images, labels, strict=True):
            accumulate_gradient(classifier, image[None], label[None], precision=precision)
            yield torch.zeros_like(shift)[None] if shift.grad is None else shift.grad[None]
            shift.grad = None
    finally:
        shift.grad = previous


def supports_per_sample_gradients(classifier: ClipClassifier, *, precision: str = "auto") -> bool:
    """Whether `per_sample_gradients` agrees with `sequential_gradients` on two images of noise.

    The test uses no image of the site, so that its time does not depend on them.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, classifier.image_size, classifier.image_size)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    labels = torch.tensor([0, 1])
    try:
        fast = torch.cat(list(per_sample_gradients(classifier, images, labels, precision=precision)))
    except PerSampleUnsupported as reason:
        log.warning("private training of this backbone takes one pass for each example: %s", reason)
        return False
    slow = torch.cat(list(sequential_gradients(classifier, images, labels, precision=precision)))
    error = float(((fast - slow).norm(dim=1) / slow.norm(dim=1).clamp_min(1e-12)).max())
    if not error < _TOLERANCE:
        log.warning("private training of this backbone takes one pass for each example: error %.2f", error)
    return error < _TOLERANCE


class DPSGDGradient:
    """Computes the gradient of each private step, for `train`.

    Args:
        classifier: its shift is trained.
        examples: the site's training examples.
        config: its batch_size is the mean number of images in a sample.
        privacy: level `image` or `group`.
        randomness: source of samples and noise; by default secret and never repeated.

    Attributes:
        units: positions of the examples of each image or group.
        sampling_rate: probability with which a unit is in a step's sample.

    Raises:
        TrainingError: there is no example, or an example without a group at the level `group`.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        examples: Sequence[Example],
        config: TrainingConfig,
        privacy: PrivacyConfig,
        randomness: SecureRandom | None = None,
    ) -> None:
        if not examples:
            raise TrainingError("no training example: the site has no labelled image of the study's classes")
        self._classifier, self._examples, self._privacy = classifier, examples, privacy
        self._augment, self._precision = build_augmentation(classifier, config), config.precision
        self.units = privacy_units(examples, privacy.level)
        self.sampling_rate = sampling_rate(len(examples), config.batch_size)
        self._random = randomness or SecureRandom()
        supported = classifier.per_sample_supported
        if self._precision not in supported:
            supported[self._precision] = supports_per_sample_gradients(classifier, precision=self._precision)
        self._gradients = per_sample_gradients if supported[self._precision] else sequential_gradients

    def __call__(self) -> float:
        """Set the shift's gradient to the noisy mean of the clipped ones; the returned loss is nan."""
        shift, privacy = self._classifier.sigma.shift, self._privacy
        sample = [self.units[i] for i in self._random.sample(len(self.units), self.sampling_rate)]
        total = self._sum(sample).to(torch.float64).cpu()
        noise = torch.from_numpy(self._random.normal(shift.numel()))
        total += privacy.noise_multiplier * privacy.clip_norm * noise
        # Divided by the expected size of the sample: its actual size is secret, too.
        shift.grad = (total / (self.sampling_rate * len(self.units))).to(shift)
        return math.nan

    def _sum(self, units: Sequence[Sequence[int]]) -> Tensor:
        """The sum of the units' clipped gradients; a unit's gradient is the mean of its images'."""
        classifier, device = self._classifier, self._classifier.device
        total = torch.zeros_like(classifier.sigma.shift, requires_grad=False)
        positions = [i for unit in units for i in unit]
        if not positions:
            return total
        images = torch.stack([self._augment(self._examples[i].image) for i in positions])
        labels = torch.tensor([self._examples[i].label for i in positions])
        unit_numbers = torch.tensor([n for n, unit in enumerate(units) for _ in unit], device=device)
        weights = torch.tensor([1 / len(unit) for unit in units for _ in unit], device=device)
        unfinished, start = torch.zeros(1, len(total), device=device), 0
        for gradients in self._gradients(classifier, images, labels, precision=self._precision):
            stop = start + len(gradients)
            rows = unit_numbers[start:stop] - unit_numbers[start]
            sums = torch.zeros(int(rows[-1]) + 1, len(total), device=device)
            sums.index_add_(0, rows, gradients * weights[start:stop, None])
            sums[0] += unfinished[0]
            # The last unit may have images in the next part, too.
            continues = stop < len(unit_numbers) and bool(unit_numbers[stop] == unit_numbers[stop - 1])
            total += clipped_sum(sums[: len(sums) - continues], self._privacy.clip_norm)
            unfinished, start = (sums[-1:] if continues else torch.zeros_like(unfinished)), stop
        return total
