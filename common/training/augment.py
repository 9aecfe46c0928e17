"""Augmentation of training images. All random numbers come from torch's global generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from fedsigma.common.config.constants import AUGMENTATIONS
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.training.classifier import ClipClassifier, resize_image

Augmentation = Callable[[Tensor], Tensor]


def _crop_and_flip(size: int, min_area: float, *more: v2.Transform) -> Augmentation:
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(size, (min_area, 1.0), interpolation=bicubic, antialias=True)
    augmentation: Augmentation = v2.Compose([crop, v2.RandomHorizontalFlip(), *more])
    return augmentation


def _paper(size: int) -> Augmentation:
    """CLIP-SVD's: random resized crop of 8 to 100 % of the area, horizontal flip."""
    return _crop_and_flip(size, 0.08)


def _gentle(size: int) -> Augmentation:
    """Crops that keep most of the image: for findings that fill it."""
    return _crop_and_flip(size, 0.6)


def _microscopy(size: int) -> Augmentation:
    """Any orientation, and the differences of light and stain between laboratories."""
    return _crop_and_flip(size, 0.5, v2.RandomVerticalFlip(), v2.Lambda(_quarter_turn), v2.Lambda(_restain))


def _restain(image: Tensor) -> Tensor:
    """Mix the channels slightly, and change brightness and contrast.

    torchvision's jitter of the hue takes ten times as long, a fifth of a step.
    """
    mix = torch.eye(3) + 0.07 * torch.randn(3, 3)
    mix = mix / mix.sum(1, keepdim=True) * (1 + 0.06 * torch.randn(3, 1))
    contrast, brightness = 1 + 0.15 * torch.randn(()), 20 * torch.randn(())
    mixed = mix.to(image.device) @ image.flatten(1).float()
    mean = mixed.mean()
    return ((mixed - mean) * contrast + mean + brightness).clamp(0, 255).to(torch.uint8).view_as(image)


def _quarter_turn(image: Tensor) -> Tensor:
    return image.rot90(int(torch.randint(4, ())), (-2, -1))


BUILDERS = dict(zip(AUGMENTATIONS, (_paper, _gentle, _microscopy, None), strict=True))


def build_augmentation(classifier: ClipClassifier, config: TrainingConfig) -> Augmentation:
    """The augmentation of a uint8 image (3, height, width), which resizes it to (3, size, size)."""
    build = BUILDERS[config.augment]
    return build(classifier.image_size) if build else partial(resize_image, backbone=classifier.backbone)
