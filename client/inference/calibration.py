"""Calibration of probabilities by one temperature, fitted on labelled images.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017): probabilities are
softmax(logits / T), where T maximises the likelihood of the labels of held-out images. The predicted classes
stay the same; only their confidence changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsigma.client.inference.loaded_model import LoadedModel, ModelLoadError, prepare_evaluation
from fedsigma.common.data.records import Source
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import Predictions, compute_metrics
from fedsigma.common.utils.files import write_whole

__all__ = ["Calibration", "calibrate", "fit_temperature", "scale_probabilities"]

FORMAT = "fedsigma-calibration-1"
MIN_IMAGES = 20


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: The temperature.
        images: Number of images it was fitted on.
        before: Expected calibration error on those images before calibration, from 0 to 1.
        after: The same after calibration.
        study: Name of the model's study.
        round: Round of the model.
    """

    temperature: float
    images: int
    before: float
    after: float
    study: str
    round: int

    def write(self, path: Path) -> None:
        """Write the calibration as JSON."""
        write_whole(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode())

    @classmethod
    def load_for(cls, model: LoadedModel, path: Path | None) -> Calibration | None:
        """Read the calibration of a model; return None without a file.

        Raises:
            ModelLoadError: The file is invalid, or was fitted for another model.
        """
        if path is None:
            return None
        fitted, name, round = cls.read(path), model.study.name, model.saved.round
        if (fitted.study, fitted.round) != (name, round):
            raise ModelLoadError(
                f"the calibration belongs to study '{fitted.study}' after round {fitted.round}, and the model"
                f" is '{name}' after round {round}: calibrate again"
            )
        return fitted

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a file that `write` wrote.

        Raises:
            ModelLoadError: The file is invalid.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            calibration = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{path} is not a calibration ({error}): use `fedsigma calibrate`") from None
        if not 0 < calibration.temperature < 1e4:
            raise ModelLoadError(
                f"{path}: the temperature is {calibration.temperature}, expected a positive number"
            )
        return calibration


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the temperature that maximises the likelihood of labels (n,) by probabilities (n, classes)."""
    logits = probabilities.double().clamp_min(1e-12).log()
    inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Optimised in the logarithm to stay positive; the loss is convex in the inverse temperature.
        loss = F.cross_entropy(logits * inverse.clamp(-6, 6).exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(torch.exp(-inverse.detach().clamp(-6, 6)))


def scale_probabilities(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities of shape (n, classes) at another temperature."""
    return (probabilities.double().clamp_min(1e-12).log() / temperature).softmax(1).to(probabilities.dtype)


def calibrate(model: LoadedModel, source: Source) -> Calibration:
    """Fit the temperature of a model on labelled images that it was not trained on, ignoring other classes.

    Raises:
        ModelLoadError: Fewer than 20 images have one of the study's classes.
    """
    classifier, examples = prepare_evaluation(model, source)
    if len(examples) < MIN_IMAGES:
        raise ModelLoadError(
            f"{len(examples)} images have one of the classes {', '.join(model.study.classes)}:"
            f" expected at least {MIN_IMAGES}"
        )
    predictions = evaluate(classifier, examples)
    temperature = fit_temperature(predictions.probabilities, predictions.labels)
    calibrated = scale_probabilities(predictions.probabilities, temperature)
    after = Predictions(probabilities=calibrated, labels=predictions.labels)
    return Calibration(
        temperature=temperature,
        images=len(examples),
        before=compute_metrics(predictions).to_dict()["ece"],
        after=compute_metrics(after).to_dict()["ece"],
        study=model.study.name,
        round=model.saved.round,
    )
