"""A backbone with its adapter and prompts as a classifier, and the precision it computes in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    """Training that cannot go on; the message says why and what to do."""


class Example(Protocol):
    """A decoded picture, uint8 (3, height, width), and its class number."""

    @property
    def image(self) -> Tensor:
        """The picture."""
        ...

    @property
    def label(self) -> int:
        """The class number."""
        ...


def resize_image(image: Tensor, backbone: Backbone) -> Tensor:
    """Resize a uint8 picture (3, height, width) to (3, size, size) as the backbone's makers do."""
    size, mode = backbone.image_size, backbone.resize_mode
    how = v2.InterpolationMode(backbone.interpolation)
    if mode == "squash":
        return v2.functional.resize(image, [size, size], interpolation=how, antialias=True)
    side = min(image.shape[1:]) if mode == "shortest" else max(image.shape[1:])
    shape = [max(1, round(n * size / side)) for n in image.shape[1:]]
    resized = v2.functional.resize(image, shape, interpolation=how, antialias=True)
    return v2.functional.center_crop(resized, [size, size])


def supports_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively; elsewhere it is several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a forward pass in this precision multiplies in bfloat16 on this device.

    Raises:
        TrainingError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise TrainingError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return precision == "bfloat16" or (precision == "auto" and supports_bfloat16(device))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context for a forward pass in the asked precision.

    Raises:
        TrainingError: an unknown precision.
    """
    wanted = uses_bfloat16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


class ClipClassifier:
    """A backbone with its adapter and the prompts of a study: what training and evaluation need.

    Args:
        backbone: loaded by `load_backbone`; `sigma` wraps its model.
        sigma: the adapter on that model.
        prompts: one a class, in the order of the labels.
        device: a GPU if there is one, by default.
        micro_batch: images that go through the model at once in training, which bounds its memory; by default
            the whole batch on a GPU, and on a processor as many as its cache is good for.
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
        self.micro_batch = micro_batch or self._default_micro_batch()
        self._mean = torch.tensor(backbone.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(backbone.std, device=self.device).view(3, 1, 1)
        adapted = {entry.tower for entry in sigma.layout.entries}
        self._image_frozen, self._text_frozen = "image" not in adapted, "text" not in adapted
        self._text: Tensor | None = None
        self.per_sample_supported: dict[str, bool] = {}
        """By precision, whether examples' gradients can be told apart in one pass; filled by `private`."""

    def _default_micro_batch(self) -> int:
        # Measured by bench/step.py --sweep on ViT-B/16 at 224 pixels: eight or sixteen images are fastest;
        # with fewer the matrix products are small, with more the activations of a layer leave the cache.
        return sys.maxsize if self.device.type != "cpu" else max(1, 8 * 224**2 // self.image_size**2)

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.prompts.tokens)

    def text_features(self, copies: int | None = None) -> Tensor:
        """Unit text features (classes, embedding); computed once if the text tower is frozen.

        With `copies`, and a text tower that is not frozen: (copies, classes, embedding), see `PromptEncoder`.
        """
        if not self._text_frozen:
            return self.prompts.features(copies)
        if self._text is None:
            with torch.no_grad():
                self._text = self.prompts.features()
        return self._text

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features (n, embedding) of uint8 pictures (n, 3, size, size)."""
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        grad = torch.no_grad() if self._image_frozen else nullcontext()
        with grad:
            return l2_normalize(self._model.encode_image(x))

    def resize(self, example: Example) -> Tensor:
        """The picture as evaluation sees it, uint8 (3, size, size)."""
        return resize_image(example.image, self.backbone)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Cosine similarities times the backbone's logit scale (n, classes), in float32.

        Also under autocast: bfloat16 would round a logit of 25 to eighths and make classes equal.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * image_features @ text_features.T

    def per_example_logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """As `logits`, of each image and its own text features (n, classes, embedding)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.backbone.logit_scale * (image_features[:, None] * text_features).sum(-1)
