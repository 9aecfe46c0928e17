"""Differentially private training: DP-SGD on the sigma shift, which hides an image or a group of images.

Each step takes a Poisson sample, clips what each image or group adds, and adds Gaussian noise to the sum
(Abadi et al. 2016, arXiv:1607.00133, algorithm 1). Whatever the optimiser does afterwards costs nothing.
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
# Rounding in bfloat16 moves a gradient by a few hundredths of its length; mixed-up examples by its whole.
_SAME = 0.2


def privacy_units(examples: Sequence[Example], level: str) -> list[list[int]]:
    """Group the examples whose presence is hidden together.

    Args:
        examples: the training examples; each has a `group` where the level is `group`.
        level: `image` or `group`.

    Returns:
        Lists of positions in `examples`, one list for each image or group.

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
                "privacy.level is 'group', and a picture has no group: give the data source's group column,"
                " or hide single pictures with level: image"
            )
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def clipped_sum(gradients: Tensor, norm: float) -> Tensor:
    """Sum gradients, each clipped to an L2 norm of at most `norm`.

    A gradient that is not finite adds nothing. The norm is lowered by a millionth, so that rounding cannot
    exceed it.

    Args:
        gradients: shape (n, values).
        norm: the clipping norm.

    Returns:
        Shape (values,), float32.
    """
    lengths = gradients.norm(dim=1)
    norm *= 1 - 1e-6
    factors = (norm / lengths.clamp_min(norm)).nan_to_num(0.0, 0.0, 0.0)
    finite = torch.isfinite(lengths)
    return factors[finite] @ gradients[finite]


def per_sample_gradients(
    classifier: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> Iterator[Tensor]:
    """The gradient of each example's cross-entropy by the classifier's shift, `classifier.micro_batch` at a
    time.

    Both towers count: each example has prompts of its own in the text tower, since the features of shared
    ones would mix what the examples do to it. So the text tower costs as much as for images times classes
    prompts.

    Args:
        classifier: its shift is trained.
        images: uint8 (n, 3, size, size).
        labels: class numbers (n,).
        precision: "auto", "float32" or "bfloat16".

    Yields:
        (m, shift size) float32, in the order of the images.

    Raises:
        PerSampleUnsupported: the model does not allow it; `sequential_gradients` does for any.
    """
    model, device = classifier.backbone.model, classifier.device
    with (
        classifier.sigma.per_sample_gradients() as separation,
        training_attention(model, precision, device, separation.project),
    ):
        for part, truth in zip(
            images.split(classifier.micro_batch), labels.split(classifier.micro_batch), strict=True
        ):
            separation.start(len(part))
            with autocast(precision, device):
                image, text = classifier.image_features(part), classifier.text_features(len(part))
                logits = (
                    classifier.logits(image, text)
                    if text.ndim == 2
                    else classifier.per_example_logits(image, text)
                )
            F.cross_entropy(logits, truth.to(device), reduction="sum").backward()
            yield separation.gradients()


def sequential_gradients(
    classifier: ClipClassifier, images: Tensor, labels: Tensor, *, precision: str = "auto"
) -> Iterator[Tensor]:
    """As `per_sample_gradients`, with one backward pass for each example: slow, and exact for any model."""
    shift = classifier.sigma.shift
    kept, shift.grad = shift.grad, None
    try:
        for image, label in zip(images, labels, strict=True):
            accumulate_gradient(classifier, image[None], label[None], precision=precision)
            yield torch.zeros_like(shift)[None] if shift.grad is None else shift.grad[None]
            shift.grad = None
    finally:
        shift.grad = kept


def supports_per_sample_gradients(classifier: ClipClassifier, *, precision: str = "auto") -> bool:
    """Whether `per_sample_gradients` gives what the loop gives, tried on two pictures of noise.

    On noise, and not on a site's pictures: how long a site takes must not depend on them.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (2, 3, classifier.image_size, classifier.image_size), generator=generator
    ).to(torch.uint8)
    labels = torch.tensor([0, 1])
    try:
        fast = torch.cat(list(per_sample_gradients(classifier, images, labels, precision=precision)))
    except PerSampleUnsupported as reason:
        log.warning("private training of this backbone takes one pass an example: %s", reason)
        return False
    slow = torch.cat(list(sequential_gradients(classifier, images, labels, precision=precision)))
    apart = ((fast - slow).norm(dim=1) / slow.norm(dim=1).clamp_min(1e-12)).max().item()
    if not apart < _SAME:
        log.warning("private training of this backbone takes one pass an example: %.2f apart", apart)
    return apart < _SAME


class DPSGDGradient:
    """One private step's gradient after another, for `train`.

    Args:
        classifier: its shift is trained.
        examples: of the site.
        recipe: its batch_size is the number of images that a sample has on average.
        privacy: level `image` or `group`.
        randomness: of samples and noise; secret and never repeated by default.

    Raises:
        TrainingError: see `privacy_units`, or no example.
    """

    def __init__(
        self,
        classifier: ClipClassifier,
        examples: Sequence[Example],
        recipe: TrainingConfig,
        privacy: PrivacyConfig,
        randomness: SecureRandom | None = None,
    ) -> None:
        if not examples:
            raise TrainingError("no training example: the site has no labelled image of the study's classes")
        self._classifier, self._examples, self._recipe, self._privacy = classifier, examples, recipe, privacy
        self._augment = build_augmentation(classifier, recipe)
        self.units = privacy_units(examples, privacy.level)
        self.sampling_rate = sampling_rate(len(examples), recipe.batch_size)
        self._random = randomness or SecureRandom()
        if recipe.precision not in classifier.per_sample_supported:
            classifier.per_sample_supported[recipe.precision] = supports_per_sample_gradients(
                classifier, precision=recipe.precision
            )
        self._gradients = (
            per_sample_gradients
            if classifier.per_sample_supported[recipe.precision]
            else sequential_gradients
        )

    def __call__(self) -> float:
        """Set the shift's gradient to the noisy mean of the clipped ones; the returned loss is nan."""
        shift, privacy = self._classifier.sigma.shift, self._privacy
        chosen = [self.units[i] for i in self._random.sample(len(self.units), self.sampling_rate)]
        total = self._sum(chosen).to(torch.float64).cpu()
        noise = torch.from_numpy(self._random.normal(shift.numel()))
        total += privacy.noise_multiplier * privacy.clip_norm * noise
        # By what is expected to be drawn, not by what was: that number is a secret, too.
        shift.grad = (total / (self.sampling_rate * len(self.units))).to(shift)
        return math.nan

    def _sum(self, units: Sequence[Sequence[int]]) -> Tensor:
        """The sum of each unit's clipped gradient, which is the mean of its images'."""
        classifier = self._classifier
        total = torch.zeros_like(classifier.sigma.shift, requires_grad=False)
        numbers = [i for unit in units for i in unit]
        if not numbers:
            return total
        images = torch.stack([self._augment(self._examples[i].image) for i in numbers])
        labels = torch.tensor([self._examples[i].label for i in numbers])
        owners = torch.tensor(
            [owner for owner, unit in enumerate(units) for _ in unit], device=classifier.device
        )
        shares = torch.tensor([1 / len(unit) for unit in units for _ in unit], device=classifier.device)
        carried, start = torch.zeros(1, len(total), device=classifier.device), 0
        for rows in self._gradients(classifier, images, labels, precision=self._recipe.precision):
            stop = start + len(rows)
            owner = owners[start:stop] - owners[start]
            sums = torch.zeros(int(owner[-1]) + 1, len(total), device=classifier.device)
            sums.index_add_(0, owner, rows * shares[start:stop, None])
            sums[0] += carried[0]
            # The last unit may have images in the next part, too.
            open_unit = stop < len(owners) and owners[stop] == owners[stop - 1]
            whole = len(sums) - int(open_unit)
            total += clipped_sum(sums[:whole], self._privacy.clip_norm)
            carried, start = (sums[-1:] if open_unit else torch.zeros_like(carried)), stop
        return total
