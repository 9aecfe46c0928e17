"""Judging images with a finished model: how a picture is brought to its size, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fedsigma.client.inference.calibration import scale_probabilities
from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError
from fedsigma.common.backbones import Backbone
from fedsigma.common.data.loading import to_tensor
from fedsigma.common.training.classifier import ClipClassifier, autocast, resize_image

__all__ = ["Prediction", "Predictor", "preprocess"]


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


def preprocess(backbone: Backbone, image: Image.Image) -> Tensor:
    """An RGB picture as the model sees it in evaluation, uint8 (3, image_size, image_size)."""
    return resize_image(to_tensor(image, side=backbone.image_size * 3 // 2), backbone)


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
        model: LoadedModel,
        *,
        temperature: float = 1.0,
        abstain_below: float = 0.0,
        precision: str = "auto",
    ) -> None:
        self.backbone, self.classes = model.backbone, tuple(model.study.classes)
        self.temperature, self.abstain_below = temperature, abstain_below
        self._precision = precision
        self._classifier = ClipClassifier(model.backbone, model.sigma, list(model.study.prompts))
        with model.sigma.inference_mode(), autocast(precision, self._classifier.device):
            self._text = self._classifier.text_features().detach()

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (n, classes) of prepared images, uint8 (n, 3, image_size, image_size).

        Raises:
            ApplyError: one is not a number.
        """
        with self._classifier.sigma.inference_mode(), autocast(self._precision, self._classifier.device):
            logits = self._classifier.logits(self._classifier.image_features(images), self._text)
            found = logits.softmax(1).cpu()
        if not bool(torch.isfinite(found).all()):
            raise ModelLoadError(
                "no finite probability comes out: the shift has diverged, take another version"
            )
        return found if self.temperature == 1 else scale_probabilities(found, self.temperature)

    def choose_class(self, probabilities: Sequence[float]) -> str | None:
        """The most probable class, or None if it is less probable than the least that was asked for."""
        best = max(range(len(self.classes)), key=probabilities.__getitem__)
        return self.classes[best] if probabilities[best] >= self.abstain_below else None
