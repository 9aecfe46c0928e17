"""Messages between server and site: one frozen dataclass each, which validates itself.

`records` converts them to and from Flower records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

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
"""Reasons why a site does not take part, by the code that it sends."""

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
        return cls(**{item.name: getattr(study, item.name) for item in fields(cls)})

    def __post_init__(self) -> None:
        _require(len(self.classes) == len(self.prompts) >= 2, "the classes and prompts differ in number")
        _require(self.shots >= 1, f"shots is {self.shots}, expected at least 1")

    def __hash__(self) -> int:
        # The sections hold tables, which have no hash.
        return hash((self.name, self.backbone, self.classes, self.prompts, self.shots, self.seed))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics of a sigma shift on a site's test images, from 0 to 1; nan if a metric is undefined.

    Attributes:
        accuracy: Accuracy.
        balanced_accuracy: Mean recall of the classes.
        auroc: Area under the ROC curve.
        f1: F1 score.
        ece: Expected calibration error.
        test_examples: Number of test images.
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
        evaluated = not math.isnan(self.accuracy)
        _require(evaluated == (self.test_examples > 0), "accuracy and test_examples contradict each other")

    @classmethod
    def of(cls, scores: Mapping[str, float], test_examples: int) -> Evaluation:
        """Build an evaluation from scores by metric; a missing metric becomes nan."""
        metrics = {name: float(scores.get(name, math.nan)) for name in METRICS}
        return cls(**metrics, test_examples=test_examples)

    def metrics(self) -> dict[str, float]:
        """Return the defined metrics and `test_examples`."""
        values = {name: getattr(self, name) for name in METRICS}
        defined = {name: value for name, value in values.items() if not math.isnan(value)}
        return {**defined, "test_examples": self.test_examples}


@dataclass(frozen=True, kw_only=True)
class HandshakeRequest:
    """First message of the server.

    Attributes:
        protocol: Version of the messages.
        study: The study.
        fingerprint: Fingerprint of the server's backbone, as JSON.
    """

    protocol: int
    study: StudySpec
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class HandshakeReply:
    """Reply of a site to the handshake.

    Attributes:
        protocol: Version of the messages.
        site: Name of the site.
        fingerprint: Fingerprint of the site's backbone, as JSON.
        version: Version of the site's FedSigma.
        sites: Number of sites in a simulation, else 0.
        problem: Key of HANDSHAKE_PROBLEMS.
        allow_attribution: Whether finished models may name the site.
        allow_explanation: Whether the server may explain the site's own shift.
        mask_key: X25519 key for masks in this run; empty without an identity.
        mask_signature: Signature of the key by the site's identity.
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

    Attributes:
        study: The study.
        recipe: Training settings.
        mode: `round` for a round of the federation, `local` for a site alone, whose shift is not averaged.
        round: Number of the round, from 1.
        cohort: Number of sites whose updates are averaged; 1 when alone.
        first_step: First step in the schedule of the study.
        steps: Number of steps.
        total_steps: Number of steps of the study.
        codec: Codec of the update.
        evaluate: Whether to evaluate the incoming shift.
        shift: The encoded shift.
        run: Key of the run folder, 16 hex digits, which identifies the site's personal values.
        privacy: Settings of differential privacy.
        members: Cohort of secure aggregation; if not empty, the reply is a `MaskedReply`.
        attempt: Number of the cohort in this round, from 0.
        bound: Largest magnitude of a value in the masked sum.
        most_examples: Largest weight of a site in the masked sum.
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
    """Result of training at a site.

    Attributes:
        update: Encoded update, relative to the decoded shift of the task.
        examples: Number of training images.
        steps: Number of steps.
        loss: Training loss; nan if training is differentially private.
        evaluation: Evaluation of the incoming shift.
        epsilon: Privacy budget spent in this study at its delta; 0 without differential privacy.
        class_counts: Training images of each class; empty unless the site's policy shares them.
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
    """A site's part of a masked sum.

    Attributes:
        masked: Integers modulo 2^32, little endian: the values of the layout, then those of `MASKED_COUNTS`.
        steps: Number of steps.
    """

    masked: bytes
    steps: int

    def __post_init__(self) -> None:
        _require(len(self.masked) % 4 == 0, "the masked integers are not whole")
        _require(0 <= self.steps < 2**31, f"steps is {self.steps}")


MASKED_COUNTS = ("examples", "loss", "test_examples", "right")
"""Sums after a masked update: training images, their loss in 1/1024, test images, correct predictions."""

LOSS_UNIT = 1024


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Evaluate shifts on the site's test images.

    Attributes:
        study: The study.
        round: Number of the round.
        shifts: The encoded shifts.
        personal: Whether to use the site's personal values.
        run: Key of the run folder, 16 hex digits.
    """

    study: StudySpec
    round: int
    shifts: tuple[bytes, ...]
    personal: bool = False
    run: str = NO_RUN

    def __post_init__(self) -> None:
        _require(bool(_RUN.fullmatch(self.run)), "the run's key is not 16 hex digits")


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """Evaluations of the shifts of a task.

    Attributes:
        evaluations: One evaluation for each shift, in order.
        confusions: Concatenated confusion matrices, row-major (true class, then predicted class); empty
            unless the site's policy shares them.
    """

    evaluations: tuple[Evaluation, ...]
    confusions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(all(0 <= count < 2**31 for count in self.confusions), "a count is out of range")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProtocolError(message)
