"""What server and site say to each other: one small frozen dataclass for each message.

Each checks its own bounds, so a message that exists is in order; `protocol` puts them on the wire.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedsigma.common.config.constants import ALL_SITES, METRICS
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import PersonalConfig, SigmaConfig
from fedsigma.common.config.study import DataConfig, StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.privacy.secure_aggregation import Member
from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "HANDSHAKE_PROBLEMS",
    "LOSS_UNIT",
    "MASKED_COUNTS",
    "EvaluateReply",
    "EvaluateTask",
    "Evaluation",
    "HandshakeReply",
    "HandshakeRequest",
    "MaskedReply",
    "ProtocolError",
    "StudySpec",
    "TrainReply",
    "TrainTask",
]

HANDSHAKE_PROBLEMS = {
    "": "",
    "protocol": "the site runs another version of FedSigma",
    "fingerprint": "the site's backbone or basis differs from the server's",
    "site-count": "the federation and the study differ in their number of sites",
}
"""Why a site takes no part, as codes: a site sends no sentence of its own."""

T = TypeVar("T")
NO_RUN = "0" * 16
_RUN = re.compile("[0-9a-f]{16}")


class ProtocolError(FedSigmaError, ValueError):
    """A message is not one of FedSigma's, or holds something that is not allowed."""


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """What a site needs to know of the study, in every task. Equal ones share what was built for them.

    Attributes:
        name: Name of the study.
        backbone: Its backbone.
        sigma: Which weights are adapted.
        classes: Class names.
        prompts: The prompt of each class.
        shots: Training images per class and site.
        seed: Seed of the study.
        data: Where a simulation's images are; None for real sites, which ignore it.
        personal: Which of the adapted weights stay at the site; None for none.
    """

    name: str
    backbone: str
    sigma: SigmaConfig
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    shots: int
    seed: int
    data: DataConfig | None = None
    personal: PersonalConfig | None = None

    @classmethod
    def of(cls, study: StudyConfig) -> StudySpec:
        """Take from a study what its sites need."""
        return cls(
            name=study.name,
            backbone=study.backbone,
            sigma=study.sigma,
            classes=study.classes,
            prompts=study.prompts,
            shots=study.shots,
            seed=study.seed,
            data=study.data,
            personal=study.personal,
        )

    def __post_init__(self) -> None:
        _require(len(self.classes) == len(self.prompts) >= 2, "the classes and prompts differ in number")
        _require(self.shots >= 1, f"shots is {self.shots}, expected at least 1")

    def __hash__(self) -> int:
        # The sections hold tables, which have no hash.
        return hash((self.name, self.backbone, self.classes, self.prompts, self.shots, self.seed))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How one sigma shift did on a site's test images; nan where a metric cannot be computed.

    Units: shares between 0 and 1; test_examples is a count.
    """

    accuracy: float
    balanced_accuracy: float
    auroc: float
    f1: float
    ece: float
    test_examples: int

    def __post_init__(self) -> None:
        _require(0 <= self.test_examples < 2**31, f"test_examples is {self.test_examples}")
        for name in METRICS:
            value = getattr(self, name)
            _require(math.isnan(value) or 0 <= value <= 1, f"{name} is {value}, expected 0 to 1")
        told = not math.isnan(self.accuracy)
        _require(told == (self.test_examples > 0), "accuracy and test_examples contradict each other")

    @classmethod
    def of(cls, scores: Mapping[str, float], test_examples: int) -> Evaluation:
        """What a site tells of a learner's scores; a metric that is missing there cannot be computed."""
        metrics = {name: float(scores.get(name, math.nan)) for name in METRICS}
        return cls(**metrics, test_examples=test_examples)

    def metrics(self) -> dict[str, float]:
        """Return what was told as a mapping, without the metrics that could not be computed."""
        told = {name: getattr(self, name) for name in METRICS}
        kept = {name: value for name, value in told.items() if not math.isnan(value)}
        return {**kept, "test_examples": self.test_examples}


@dataclass(frozen=True, kw_only=True)
class HandshakeRequest:
    """The server asks who is there, and tells its own fingerprint so that the site can compare, too."""

    protocol: int
    study: StudySpec
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class HandshakeReply:
    """A site says its name and fingerprint. version: of its FedSigma; sites: the study's number of sites in a
    simulation, else 0; allow_attribution, whether finished models may name it; allow_explanation, whether the
    server may say in words what its own shift changed.

    mask_key is its X25519 key for masks in this run, mask_signature its identity's signature of it; empty if
    it has no identity.
    """

    protocol: int
    site: str
    fingerprint: str
    version: str
    sites: int = 0
    problem: str = ""
    allow_attribution: bool = False
    allow_explanation: bool = False
    mask_key: bytes = b""
    mask_signature: bytes = b""

    def __post_init__(self) -> None:
        plain_name = 0 < len(self.site) <= 80 and self.site.isprintable() and self.site != ALL_SITES
        _require(plain_name, "the site's name is empty, too long, reserved or not printable")
        plain = 0 < len(self.version) <= 64 and self.version.isprintable()
        _require(plain, "the version is empty, too long or not printable")
        _require(self.problem in HANDSHAKE_PROBLEMS, "the problem is not one of the known ones")
        _require(0 <= self.sites < 2**31, "the number of sites is out of range")
        sizes = len(self.mask_key), len(self.mask_signature)
        _require(sizes in ((0, 0), (32, 64)), "the mask's key or its signature has a wrong length")


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Evaluate the incoming shift, then train it on the site's own images.

    Fields: mode, `round` for a round of the federation or `local` for a site alone, whose shift is not
    averaged; cohort, the number of sites whose shifts are averaged together (1 when alone); first_step,
    steps and total_steps place this training in the whole study's schedule; codec, how to code the change;
    privacy, what training has to hide; run, the key of the run folder (16 hex digits), by which a site finds
    its personal values again.

    With members, the reply is a `MaskedReply` for this cohort. attempt counts the cohorts of one round from
    0; bound is the largest magnitude of a value that the sum has room for, and most_examples the most images
    that a site counts for.
    """

    study: StudySpec
    recipe: LocalTrainingConfig
    mode: str
    round: int
    cohort: int
    first_step: int
    steps: int
    total_steps: int
    codec: str
    evaluate: bool
    shift: bytes
    run: str = NO_RUN
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    members: tuple[Member, ...] = ()
    attempt: int = 0
    bound: float = 1.0
    most_examples: int = 1

    def __post_init__(self) -> None:
        fits = 0 <= self.attempt < 2**31 and 1 <= self.most_examples < 2**31 and 0 < self.bound < 2**31
        _require(fits, "attempt, bound or most_examples is out of range")
        _require(self.mode in ("round", "local"), f"mode is '{self.mode}', expected 'round' or 'local'")
        _require(self.round >= 1 and self.cohort >= 1, "round and cohort count from 1")
        _require(bool(_RUN.fullmatch(self.run)), "the run's key is not 16 hex digits")
        fits = 0 <= self.first_step < self.first_step + self.steps <= self.total_steps < 2**31
        _require(fits, f"{self.steps} steps from {self.first_step} do not fit into {self.total_steps}")


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """How training changed the shift, on how many images, and how the incoming shift did.

    change is coded, and counts from the shift as the site decoded it from the task. loss is nan, for untold,
    where training is differentially private; epsilon is then what the site's images have been given so far in
    this study, at the study's delta, and else 0.
    class_counts are the training images of each class; empty unless the site's policy lets it tell them.
    """

    update: bytes
    examples: int
    steps: int
    loss: float
    evaluation: Evaluation
    epsilon: float = 0.0
    class_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(1 <= self.examples < 2**31, f"examples is {self.examples}, expected at least 1")
        _require(0 <= self.steps < 2**31, f"steps is {self.steps}")
        _require(math.isfinite(self.loss) or math.isnan(self.loss), "the loss is infinite")
        _require(math.isfinite(self.epsilon) and self.epsilon >= 0, f"epsilon is {self.epsilon}")
        _require(all(0 <= count < 2**31 for count in self.class_counts), "a class count is out of range")


@dataclass(frozen=True, kw_only=True)
class MaskedReply:
    """A site's part of a masked sum: integers modulo 2^32, little endian.

    Behind the values of the layout stand those of `MASKED_COUNTS`. Nothing else of the training is told.
    """

    masked: bytes
    steps: int

    def __post_init__(self) -> None:
        _require(len(self.masked) % 4 == 0, "the masked integers are not whole")
        _require(0 <= self.steps < 2**31, f"steps is {self.steps}")


MASKED_COUNTS = ("examples", "loss", "test_examples", "right")
"""Sums that come with a masked change: training images, their loss in 1/1024, test images, right answers."""

LOSS_UNIT = 1024


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Evaluate these shifts on the site's test images, each with the site's personal values if asked for."""

    study: StudySpec
    round: int
    shifts: tuple[bytes, ...]
    personal: bool = False
    run: str = NO_RUN

    def __post_init__(self) -> None:
        _require(bool(_RUN.fullmatch(self.run)), "the run's key is not 16 hex digits")


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """One evaluation for each shift of the task, in its order.

    confusions are their confusion matrices, one after another and each row by row (images by true class, then
    by predicted class); empty unless the site's policy lets it tell them.
    """

    evaluations: tuple[Evaluation, ...]
    confusions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(all(0 <= count < 2**31 for count in self.confusions), "a count is out of range")


def _require(condition: bool, words: str) -> None:
    if not condition:
        raise ProtocolError(words)
