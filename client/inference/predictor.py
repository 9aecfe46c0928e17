"""Predictions of a loaded model: image preprocessing and class probabilities."""

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
    """The prediction for one file or one DICOM series.

    Attributes:
        file: Path of the file in the folder; for a series, that of its first image.
        probabilities: One probability a class, in the order of the study's classes.
        prediction: The predicted class; None where the model abstains.
        images: Number of images that the probabilities are the mean of.
        series: SeriesInstanceUID; empty without one, or where each file is predicted separately.
    """

    file: str
    probabilities: tuple[float, ...]
    prediction: str | None
    images: int = 1
    series: str = ""


def preprocess(backbone: Backbone, image: Image.Image) -> Tensor:
    """Resize an RGB image as in evaluation, to uint8 of shape (3, image_size, image_size)."""
    return resize_image(to_tensor(image, side=backbone.image_size * 3 // 2), backbone)


class Predictor:
    """Predicts images with a loaded model, whose text features are computed once.

    Args:
        model: The model. With a merged shift, inference costs as much as for the plain model; otherwise
            enter `model.sigma.inference_mode()` around several calls.
        temperature: Temperature of the probabilities, from a calibration; 1 for none.
        abstain_below: Probability below which no class is predicted.
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
        """Return class probabilities of shape (n, classes), on the CPU.

        Args:
            images: Preprocessed images, uint8 of shape (n, 3, image_size, image_size).

        Raises:
            ModelLoadError: A probability is not finite.
        """
        with self._classifier.sigma.inference_mode(), autocast(self._precision, self._classifier.device):
            logits = self._classifier.logits(self._classifier.image_features(images), self._text)
            probabilities = logits.softmax(1).cpu()
        if not bool(torch.isfinite(probabilities).all()):
            raise ModelLoadError(
                "the probabilities are not finite: the shift has diverged, use another version"
            )
        if self.temperature == 1:
            return probabilities
        return scale_probabilities(probabilities, self.temperature)

    def choose_class(self, probabilities: Sequence[float]) -> str | None:
        """Return the most probable class, or None if its probability is below `abstain_below`."""
        best = max(range(len(self.classes)), key=probabilities.__getitem__)
        return self.classes[best] if probabilities[best] >= self.abstain_below else None
