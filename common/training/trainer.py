"""Training and evaluation of a sigma shift on images, at a site and at the server.

The shift is an argument and a result: a `Trainer` keeps no state of a call.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig
from fedsigma.common.config.training import LocalTrainingConfig

if TYPE_CHECKING:
    from fedsigma.common.explain import Explainer
    from fedsigma.common.sigma import Fingerprint, Layout, ParameterPartition, SigmaModel

__all__ = [
    "EvalOutput",
    "TrainOutput",
    "Trainer",
    "TrainerPool",
    "derive_seed",
    "open_trainer",
    "release_memory",
    "trainers",
]

Vector = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TrainOutput:
    """Result of training.

    Attributes:
        shift: the trained shift, shape (layout.size,), float32.
        loss: mean cross-entropy of the steps; nan where training is private.
        steps: number of steps.
        examples: number of training examples.
    """

    shift: Vector
    loss: float
    steps: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class EvalOutput:
    """Result of an evaluation.

    Attributes:
        metrics: the scalar metrics by name, and `examples`, the number of images.
        confusion: number of images by true class (rows) and predicted class (columns), row by row.
    """

    metrics: dict[str, float]
    confusion: tuple[int, ...]


class Trainer:
    """The interface between the federation and the method: a backbone, adapted, for one list of classes.

    Args:
        backbone: name of the backbone.
        sigma: which weights are adapted.
        classes: names of the classes; trainers of other classes are kept apart.
        prompts: one for each class.

    Attributes:
        layout: the adapted matrices.
        fingerprint: of the backbone and its basis.
        parameter_count: number of values of the backbone without its adapter.
        image_side: images are loaded with their shorter side at most this long, in pixels.
    """

    def __init__(
        self, backbone: str, sigma: SigmaConfig, classes: tuple[str, ...], prompts: tuple[str, ...]
    ) -> None:
        # torch and open_clip take seconds to import; a server that only reads settings need not pay.
        from fedsigma.common.backbones import load_backbone
        from fedsigma.common.sigma import SigmaModel
        from fedsigma.common.training.classifier import ClipClassifier

        loaded = load_backbone(backbone)
        self.parameter_count = sum(weight.numel() for weight in loaded.model.parameters())
        self.sigma = SigmaModel.adapt(loaded.model, sigma)
        self.classifier = ClipClassifier(loaded, self.sigma, prompts)
        self.layout: Layout = self.sigma.layout
        self.fingerprint: Fingerprint = self.sigma.fingerprint
        self._partitions: dict[PersonalConfig | None, ParameterPartition] = {}
        self._explainer: Explainer | None = None
        # Room for random crops without keeping full-size images in memory.
        self.image_side = loaded.image_size * 3 // 2
        release_memory()  # of the random weights that the loaded ones replaced

    def train(
        self,
        shift: Vector,
        examples: Sequence[Any],
        config: LocalTrainingConfig,
        *,
        first_step: int,
        steps: int,
        total_steps: int,
        seed: int,
        privacy: PrivacyConfig | None = None,
    ) -> TrainOutput:
        """Train from `shift` on these examples.

        With privacy in training, the result depends on the examples through noise alone, and on their number.

        Args:
            shift: where to start, shape (layout.size,).
            examples: see `classifier.Example`.
            config: settings of the optimiser.
            first_step: number of this call's first step within the study, for the schedule.
            steps: number of steps.
            total_steps: number of steps of the whole study.
            seed: of batches and augmentation.
            privacy: the study's privacy; none by default.
        """
        from fedsigma.common.training.dp_sgd import DPSGDGradient
        from fedsigma.common.training.loop import train

        self._set(shift)
        gradient = None
        if privacy is not None and privacy.in_training:
            gradient = DPSGDGradient(self.classifier, examples, config, privacy)
        loss = train(
            self.classifier,
            list(examples),
            config,
            first_step=first_step,
            steps=steps,
            total_steps=total_steps,
            seed=seed,
            gradient=gradient,
        )
        trained: Vector = self.sigma.get_shift().numpy()
        release_memory()
        return TrainOutput(shift=trained, loss=loss, steps=steps, examples=len(examples))

    def partition(self, personal: PersonalConfig | None) -> ParameterPartition:
        """Which values of the layout are shared where these are personal."""
        if personal not in self._partitions:
            self._partitions[personal] = make_partition(self.sigma, personal)
        return self._partitions[personal]

    def evaluate(self, shift: Vector, examples: Sequence[Any]) -> EvalOutput:
        """Evaluate `shift` on these examples."""
        from fedsigma.common.training.loop import evaluate
        from fedsigma.common.training.metrics import compute_metrics

        self._set(shift)
        result = compute_metrics(evaluate(self.classifier, list(examples)))
        release_memory()
        metrics = result.to_dict()
        if "accuracy" in metrics:
            # torch counts in float32; float64 holds the fraction of correct predictions better.
            metrics["accuracy"] = round(metrics["accuracy"] * len(examples)) / len(examples)
        return EvalOutput(metrics=metrics, confusion=tuple(result.confusion.flatten().tolist()))

    def explain(self, shift: Vector, *, heads: int = 8, phrases: int = 5) -> list[dict[str, Any]]:
        """Describe what a shift changed, with a row for each of the heads that changed most.

        The first call encodes all descriptions; further calls take next to no time.

        Raises:
            ExplainError: the adapted weights cannot be assigned to heads.
        """
        import torch

        from fedsigma.common.explain import Phrases
        from fedsigma.common.explain.report import build_explainer, to_rows

        if self._explainer is None:
            self._explainer = build_explainer(self.classifier.backbone, self.sigma, Phrases.bundled())
        return to_rows(self._explainer.explain(torch.from_numpy(shift), heads=heads, phrases=phrases))

    def _set(self, shift: Vector) -> None:
        import torch

        self.sigma.set_shift(torch.from_numpy(np.array(shift, dtype=np.float32)))


def make_partition(sigma: SigmaModel, personal: PersonalConfig | None) -> ParameterPartition:
    """Which values of an adapted model's shift are shared where these are personal.

    Raises:
        LayoutError: all of the adapted weights are personal, or none of them.
    """
    from fedsigma.common.sigma import LayoutError, ParameterPartition, find_layout

    if personal is None:
        return ParameterPartition(sigma.layout)
    try:
        return ParameterPartition(
            sigma.layout, frozenset(entry.key for entry in find_layout(sigma.model, personal).entries)
        )
    except LayoutError as error:
        raise LayoutError(f"personal is {personal}: {error}") from error


TrainerFactory = Callable[..., Trainer]
"""Builds a trainer from the arguments of `Trainer`."""


class TrainerPool:
    """Builds trainers and keeps the two used last: building one takes seconds.

    Attributes:
        factory: builds a trainer. Trainers built by another factory are not returned.
    """

    def __init__(self, factory: TrainerFactory) -> None:
        self.factory = factory
        self._build: TrainerFactory = lru_cache(maxsize=2)(lambda factory, *args: factory(*args))

    def open(
        self, backbone: str, sigma: SigmaConfig, classes: tuple[str, ...], prompts: tuple[str, ...]
    ) -> Trainer:
        """The trainer of these arguments of `Trainer`, built at most once while it is kept."""
        return self._build(self.factory, backbone, sigma, classes, prompts)


trainers = TrainerPool(Trainer)
"""The trainers of this process."""

open_trainer = trainers.open


def derive_seed(seed: int, *path: str | int) -> int:
    """Derive the seed of one piece of work, such as a site's training in one round, from the study's.

    Sites must not share a seed (they would draw the same augmentations), and a resumed run must draw what
    the interrupted one would have drawn.
    """
    text = ":".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def release_memory() -> None:
    """Return freed memory to the system, where the C library can do so (glibc).

    glibc keeps freed blocks of up to 32 MB for later, which after a training step are gigabytes. A site that
    waits for the next round, or a simulation's idle actor, does not need them.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, or none (Windows)
        ctypes.CDLL(None).malloc_trim(0)
