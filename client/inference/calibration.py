"""Calibrated probabilities: one temperature, fitted on labelled images of one's own.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017): probabilities are
softmax(logits / T). T is the one value that makes the labels of held-out images most likely. It changes no
judgement, only how sure each is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsigma.client.inference.loaded_model import (
    LoadedModel,
    ModelLoadError,
    prepare_evaluation,
    select_labelled,
)
from fedsigma.common.data.records import Source
from fedsigma.common.training.loop import evaluate
from fedsigma.common.training.metrics import Predictions, compute_metrics
from fedsigma.common.utils.files import write_whole

__all__ = ["Calibration", "calibrate", "fit_temperature", "scale_probabilities"]

FORMAT = "fedsigma-calibration-1"
MIN_IMAGES = 20


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it was fitted on.

    Fields: temperature; images, how many; before and after, the expected calibration errors on those images,
    shares; study and round, of the model it belongs to.
    """

    temperature: float
    images: int
    before: float
    after: float
    study: str
    round: int

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode())

    @classmethod
    def load_for(cls, model: LoadedModel, path: Path | None) -> Calibration | None:
        """Read the calibration of a model, where a file is named.

        Raises:
            ApplyError: it is no calibration, or was not fitted for this model.
        """
        if path is None:
            return None
        found = cls.read(path)
        found.check(model)
        return found

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read what `write` wrote.

        Raises:
            ApplyError: it is no calibration.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            found = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{path} is no calibration ({error}): use `fedsigma calibrate`") from None
        if not 0 < found.temperature < 1e4:
            raise ModelLoadError(
                f"{path}: the temperature is {found.temperature}, expected a positive number"
            )
        return found

    def check(self, model: LoadedModel) -> None:
        """Refuse a model that it was not fitted for.

        Raises:
            ApplyError: study or round differ.
        """
        saved = model.saved
        if (self.study, self.round) != (model.study.name, saved.round):
            raise ModelLoadError(
                f"the calibration belongs to study '{self.study}' after round {self.round}, and the model is"
                f" '{model.study.name}' after round {saved.round}: calibrate again"
            )


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature under which the labels are most likely.

    Shapes: probabilities (n, classes), labels (n,).
    """
    logits = probabilities.double().clamp_min(1e-12).log()
    inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # In the logarithm, so that it stays positive; the loss is convex in the inverse temperature.
        loss = F.cross_entropy(logits * inverse.clamp(-6, 6).exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return float(torch.exp(-inverse.detach().clamp(-6, 6)))


def scale_probabilities(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities at another temperature. Shapes: (n, classes)."""
    return (probabilities.double().clamp_min(1e-12).log() / temperature).softmax(1).to(probabilities.dtype)


def calibrate(model: LoadedModel, source: Source) -> Calibration:
    """Fit the temperature of a model on labelled images that it was not trained on.

    Raises:
        ApplyError: fewer than 20 images have one of the study's classes.
    """
    records = select_labelled(model, source)
    if len(records) < MIN_IMAGES:
        raise ModelLoadError(
            f"{len(records)} images there have one of the classes {', '.join(model.study.classes)}:"
            f" at least {MIN_IMAGES} are needed to fit a temperature"
        )
    task, examples = prepare_evaluation(model, source, records)
    found = evaluate(task, examples)
    temperature = fit_temperature(found.probabilities, found.labels)
    after = Predictions(
        probabilities=scale_probabilities(found.probabilities, temperature), labels=found.labels
    )
    return Calibration(
        temperature=temperature,
        images=len(examples),
        before=compute_metrics(found).to_dict()["ece"],
        after=compute_metrics(after).to_dict()["ece"],
        study=model.study.name,
        round=model.saved.round,
    )
