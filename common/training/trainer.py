"""Trainers: train a sigma shift on images and evaluate it, at a site and at the server.

A `Trainer` has one backbone with its basis, for one list of classes. Building one takes seconds, so each
process keeps the last ones. The shift is an argument and a result; a trainer keeps no state of a call.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

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
NO_PRIVACY = PrivacyConfig()


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


class Trainer(Protocol):
    """The interface between the federation and the method."""

    layout: Layout
    fingerprint: Fingerprint

    def partition(self, personal: PersonalConfig | None) -> ParameterPartition:
        """Which values of the layout are shared where these are personal."""
        ...

    parameter_count: int
    """How many values the backbone has, as it came."""

    image_side: int
    """Images are loaded with their shorter side at most this long, in pixels."""

    def train(
        self,
        shift: Vector,
        examples: Sequence[Any],
        recipe: LocalTrainingConfig,
        *,
        first_step: int,
        steps: int,
        total_steps: int,
        seed: int,
        privacy: PrivacyConfig = NO_PRIVACY,
    ) -> TrainOutput:
        """Train from `shift` on these examples; first_step and total_steps place it in the schedule.

        Where privacy is to be kept in training, nothing of what is returned depends on them otherwise than
        through noise, but their number.
        """
        ...

    def evaluate(self, shift: Vector, examples: Sequence[Any]) -> EvalOutput:
        """Evaluate `shift` on these examples."""
        ...

    def explain(self, shift: Vector, *, heads: int = 8, phrases: int = 5) -> list[dict[str, Any]]:
        """What a shift changed, in words: a row for each of the heads that changed most.

        The first takes the text tower's time for all descriptions, each further one next to none.

        Raises:
            ExplainError: the adapted weights cannot be assigned to heads.
        """
        ...


class SigmaTrainer:
    """The trainer of a real backbone."""

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
        self._splits: dict[PersonalConfig | None, ParameterPartition] = {}
        self._explainer: Explainer | None = None
        # Room for random crops without keeping full-size images in memory.
        self.image_side = loaded.image_size * 3 // 2
        release_memory()  # the random weights that the loaded ones took the place of

    def train(
        self,
        shift: Vector,
        examples: Sequence[Any],
        recipe: LocalTrainingConfig,
        *,
        first_step: int,
        steps: int,
        total_steps: int,
        seed: int,
        privacy: PrivacyConfig = NO_PRIVACY,
    ) -> TrainOutput:
        """See `Trainer.train`."""
        from fedsigma.common.training.dp_sgd import DPSGDGradient
        from fedsigma.common.training.loop import train

        self._set(shift)
        gradient = DPSGDGradient(self.classifier, examples, recipe, privacy) if privacy.in_training else None
        result = train(
            self.classifier,
            list(examples),
            recipe,
            first_step=first_step,
            steps=steps,
            total_steps=total_steps,
            seed=seed,
            gradient=gradient,
        )
        trained = self.sigma.get_shift().detach().cpu().numpy().astype(np.float32)
        release_memory()
        return TrainOutput(shift=trained, loss=float(result.loss), steps=steps, examples=len(examples))

    def partition(self, personal: PersonalConfig | None) -> ParameterPartition:
        """See `Trainer.partition`."""
        if personal not in self._splits:
            self._splits[personal] = make_partition(self.sigma, personal)
        return self._splits[personal]

    def evaluate(self, shift: Vector, examples: Sequence[Any]) -> EvalOutput:
        """See `Trainer.evaluate`."""
        from fedsigma.common.training.loop import evaluate
        from fedsigma.common.training.metrics import compute_metrics

        self._set(shift)
        found = compute_metrics(evaluate(self.classifier, list(examples)))
        release_memory()
        scores = found.to_dict()
        if "accuracy" in scores:
            # torch counts in float32; right answers over images is a fraction that float64 holds better.
            scores["accuracy"] = round(scores["accuracy"] * len(examples)) / len(examples)
        return EvalOutput(metrics=scores, confusion=tuple(found.confusion.flatten().tolist()))

    def explain(self, shift: Vector, *, heads: int = 8, phrases: int = 5) -> list[dict[str, Any]]:
        """See `Trainer.explain`."""
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
        LayoutError: all or nothing of what is adapted is personal.
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


TrainerFactory = Callable[[str, SigmaConfig, tuple[str, ...], tuple[str, ...]], Trainer]
"""Builds a trainer from the backbone's name, the adapted weights, the classes and their prompts."""


class TrainerPool:
    """Builds trainers and keeps the ones used last: building one takes seconds.

    Args:
        factory: builds a trainer.
        size: how many trainers are kept.

    Attributes:
        factory: builds a trainer. Trainers built by another factory are not returned.
    """

    def __init__(self, factory: TrainerFactory, size: int = 2) -> None:
        self.factory = factory
        self._build = lru_cache(maxsize=size)(lambda factory, *args: factory(*args))

    def open(
        self, backbone: str, sigma: SigmaConfig, classes: tuple[str, ...], prompts: tuple[str, ...]
    ) -> Trainer:
        """The trainer for a backbone and classes, built at most once while it is kept."""
        return self._build(self.factory, backbone, sigma, classes, prompts)


trainers = TrainerPool(SigmaTrainer)
"""The trainers of this process."""

open_trainer = trainers.open


def derive_seed(seed: int, *place: str | int) -> int:
    """Derive the seed of one piece of work, such as a site's training in one round, from the study's.

    Sites must not share a seed (they would draw the same augmentations), and a resumed run must draw what
    the interrupted one would have drawn.
    """
    text = ":".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def release_memory() -> None:
    """Return to the system what has been freed, where the C library can do so (glibc).

    glibc keeps freed blocks of up to 32 MB for later, which after a training step are gigabytes. A site that
    waits for the next round, or a simulation's actor whose turn it is not, does not need them.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library to ask, as on Windows
        return None
