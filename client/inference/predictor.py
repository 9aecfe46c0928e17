"""Judging images with a finished model: how a picture is brought to its size, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fedsigma.client.inference.calibration import scaled
from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError
from fedsigma.common.backbones import Backbone
from fedsigma.common.data.loading import to_tensor
from fedsigma.common.training.classifier import ClipClassifier, autocast, resize_image

__all__ = ["Prediction", "Predictor", "prepared"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said of one file or of one series; writers of results take a list of these.

    Fields: file, its path in the folder, of a series that of its first image; probabilities, one a class, in
    the order of the study's classes; prediction, the class, None where the model abstains; images, how many
    the probabilities are the mean of; series, the SeriesInstanceUID, empty where there is none or where files
    are judged by themselves.
    """

    file: str
    probabilities: tuple[float, ...]
    prediction: str | None
    images: int = 1
    series: str = ""


def prepared(backbone: Backbone, picture: Image.Image) -> Tensor:
    """An RGB picture as the model sees it in evaluation, uint8 (3, image_size, image_size)."""
    return resize_image(to_tensor(picture, side=backbone.image_size * 3 // 2), backbone)


class Predictor:
    """A finished model with its text features, which are computed once.

    Args:
        restored: the model. If its shift is merged, judging costs what the plain model does; if not, enter
            `restored.sigma.inference_mode()` around several calls.
        temperature: of the probabilities, from a calibration; 1 leaves them as they are.
        least: below this probability of its first class an image is not judged.
        precision: "auto", "float32" or "bfloat16".
    """

    def __init__(
        self,
        restored: LoadedModel,
        *,
        temperature: float = 1.0,
        least: float = 0.0,
        precision: str = "auto",
    ) -> None:
        self.backbone, self.classes = restored.backbone, tuple(restored.study.classes)
        self.temperature, self.least = temperature, least
        self._precision = precision
        self._task = ClipClassifier(restored.backbone, restored.sigma, list(restored.study.prompts))
        with restored.sigma.inference_mode(), autocast(precision, self._task.device):
            self._text = self._task.text_features().detach()

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (n, classes) of prepared images, uint8 (n, 3, image_size, image_size).

        Raises:
            ApplyError: one is not a number.
        """
        with self._task.sigma.inference_mode(), autocast(self._precision, self._task.device):
            logits = self._task.logits(self._task.image_features(images), self._text)
            found = logits.softmax(1).cpu()
        if not bool(torch.isfinite(found).all()):
            raise ModelLoadError(
                "no finite probability comes out: the shift has diverged, take another version"
            )
        return found if self.temperature == 1 else scaled(found, self.temperature)

    def name(self, probabilities: Sequence[float]) -> str | None:
        """The most probable class, or None if it is less probable than the least that was asked for."""
        best = max(range(len(self.classes)), key=probabilities.__getitem__)
        return self.classes[best] if probabilities[best] >= self.least else None
