"""An adapted backbone with prompts as a classifier, and the precision that it computes in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.transforms import v2

from fedsigma.common.backbones import Backbone
from fedsigma.common.config.constants import PRECISIONS
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.prompts import PromptEncoder, l2_normalize
from fedsigma.common.utils.errors import FedSigmaError


class TrainingError(FedSigmaError, RuntimeError):
    """Training or evaluation is impossible; the message says why and what to do."""


class Example(Protocol):
    """A labelled image."""

    @property
    def image(self) -> Tensor:
        """The decoded image, uint8 (3, height, width)."""

    @property
    def label(self) -> int:
        """The class number."""


def resize_image(image: Tensor, backbone: Backbone) -> Tensor:
    """Resize a uint8 image (3, height, width) to (3, size, size), as the backbone's authors do."""
    size, mode = backbone.image_size, backbone.resize_mode
    shape = [size, size]
    if mode != "squash":
        side = min(image.shape[1:]) if mode == "shortest" else max(image.shape[1:])
        shape = [max(1, round(n * size / side)) for n in image.shape[1:]]
    interpolation = v2.InterpolationMode(backbone.interpolation)
    resized: Tensor = v2.functional.resize(image, shape, interpolation=interpolation, antialias=True)
    if mode != "squash":
        resized = v2.functional.center_crop(resized, [size, size])
    return resized


def supports_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively; elsewhere it is several times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a forward pass in this precision multiplies in bfloat16 on this device.

    Raises:
        TrainingError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise TrainingError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return precision == "bfloat16" or (precision == "auto" and supports_bfloat16(device))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context for a forward pass in this precision; raises as `uses_bfloat16`."""
    if uses_bfloat16(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


class ClipClassifier:
    """An adapted backbone and the prompts of a study.

    Args:
        backbone: loaded by `load_backbone`.
        sigma: the adapter of the backbone's model.
        prompts: one for each class, in the order of the labels.
        device: by default a GPU if there is one.
        micro_batch: number of images that go through the model at once in training, which bounds its memory;
            by default the whole batch on a GPU, and on a processor what is fastest.

    Attributes:
        per_sample_supported: by precision, whether per-sample gradients take one pass; filled by `dp_sgd`.
    """

    def __init__(
        self,
        backbone: Backbone,
        sigma: SigmaModel,
        prompts: Sequence[str],
        *,
        device: torch.device | str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.backbone, self.sigma = backbone, sigma.to(self.device)
        self._model: Any = backbone.model
        self.prompts = PromptEncoder(backbone, prompts)
        self.image_size = backbone.image_size
        # Measured by bench/step.py --sweep on ViT-B/16 at 224 pixels: eight or sixteen images are fastest;
        # with fewer the matrix products are small, with more the activations of a layer leave the cache.
        fastest = max(1, 8 * 224**2 // self.image_size**2) if self.device.type == "cpu" else sys.maxsize
        self.micro_batch = micro_batch or fastest
        self._mean = torch.tensor(backbone.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(backbone.std, device=self.device).view(3, 1, 1)
        adapted = {entry.tower for entry in sigma.layout.entries}
        self._image_frozen, self._text_frozen = "image" not in adapted, "text" not in adapted
        self._text: Tensor | None = None
        self.per_sample_supported: dict[str, bool] = {}

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.prompts.tokens)

    def micro_batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Split a batch into parts that go through the model at once; the labels are on its device."""
        parts = zip(torch.split(images, self.micro_batch), torch.split(labels, self.micro_batch), strict=True)
        return ((part, part_labels.to(self.device)) for part, part_labels in parts)

    def text_features(self, copies: int | None = None) -> Tensor:
        """Text features of length 1 (classes, embedding); computed once if the text tower is frozen.

        With `copies`, and a text tower that is not frozen: (copies, classes, embedding), see `PromptEncoder`.
        """
        if not self._text_frozen:
            return self.prompts.features(copies)
        if self._text is None:
            with torch.no_grad():
                self._text = self.prompts.features()
        return self._text

    def image_features(self, images: Tensor) -> Tensor:
        """Image features of length 1 (n, embedding) of uint8 images (n, 3, size, size)."""
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        with torch.no_grad() if self._image_frozen else nullcontext():
            return l2_normalize(self._model.encode_image(x))

    def resize(self, example: Example) -> Tensor:
        """The example's image as evaluation sees it, uint8 (3, size, size)."""
        return resize_image(example.image, self.backbone)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine similarities times the backbone's logit scale (n, classes), in float32.

        Also under autocast: bfloat16 would round a logit of 25 to eighths and make classes equal.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * image_features @ text_features.T

    def per_example_logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """As `logits`, with text features for each image (n, classes, embedding)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * (image_features[:, None] * text_features).sum(-1)
