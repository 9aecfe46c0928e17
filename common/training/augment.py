"""What training does to an image before the model sees it. All draws come from torch's global generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from fedsigma.common.config.constants import AUGMENTATIONS
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.training.classifier import ClipClassifier, TrainingError, resize_image

Augmentation = Callable[[Tensor], Tensor]


def _crop(size: int, least: float) -> v2.Transform:
    return v2.RandomResizedCrop(
        size, (least, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


def _paper(size: int) -> Augmentation:
    """CLIP-SVD's: random resized crop of 8 to 100% of the area, horizontal flip."""
    return v2.Compose([_crop(size, 0.08), v2.RandomHorizontalFlip()])


def _gentle(size: int) -> Augmentation:
    """Crops that keep most of the picture: for findings that fill it."""
    return v2.Compose([_crop(size, 0.6), v2.RandomHorizontalFlip()])


def _microscopy(size: int) -> Augmentation:
    """Any orientation, and the changes of light and stain between laboratories."""
    turns = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.Lambda(_quarter_turn)]
    return v2.Compose([_crop(size, 0.5), *turns, v2.Lambda(_restain)])


def _restain(image: Tensor) -> Tensor:
    """Mix the channels a little, and change brightness and contrast.

    One matrix product; torchvision's jitter of the hue costs ten times as much, a fifth of a step.
    """
    mix = torch.eye(3) + 0.07 * torch.randn(3, 3)
    mix = mix / mix.sum(1, keepdim=True) * (1 + 0.06 * torch.randn(3, 1))
    contrast, brightness = 1 + 0.15 * torch.randn(()), 20 * torch.randn(())
    mixed = mix.to(image.device) @ image.flatten(1).float()
    mean = mixed.mean()
    return ((mixed - mean) * contrast + mean + brightness).clamp(0, 255).to(torch.uint8).view_as(image)


def _quarter_turn(image: Tensor) -> Tensor:
    return image.rot90(int(torch.randint(4, ())), (-2, -1))


_AUGMENTERS: tuple[Callable[[int], Augmentation] | None, ...] = (_paper, _gentle, _microscopy, None)
BUILDERS = dict(zip(AUGMENTATIONS, _AUGMENTERS, strict=True))


def build_augmentation(classifier: ClipClassifier, config: TrainingConfig) -> Augmentation:
    """What training does to a picture (3, height, width) before the model sees it (3, size, size).

    Raises:
        TrainingError: the recipe names an augmentation that is not known.
    """
    if config.augment not in AUGMENTATIONS:
        raise TrainingError(f"unknown augmentation {config.augment!r}: use one of {', '.join(AUGMENTATIONS)}")
    build = BUILDERS[config.augment]
    return build(classifier.image_size) if build else partial(resize_image, backbone=classifier.backbone)
