"""The messages between server and site, and the only place that knows how they lie in Flower's records.

Each message is a small frozen dataclass. `to_content` turns one into a Flower record and `from_content`
turns a record back, or raises `ProtocolError`: the fields must be exactly those of the dataclass, each of its
type and within its bounds. So a reply can carry nothing but what its dataclass names, whoever built it.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedsigma.common.config import DataConfig, SigmaConfig, StudyConfig, TrainingConfig
from fedsigma.common.masking import Member
from fedsigma.common.names import METRICS
from fedsigma.common.reading import ConfigError, build

__all__ = [
    "HELLO",
    "LOSS_UNIT",
    "MASKED_COUNTS",
    "MAX_REPLY_BYTES",
    "PROBLEMS",
    "PROTOCOL",
    "EvaluateReply",
    "EvaluateTask",
    "Evaluation",
    "Hello",
    "HelloReply",
    "MaskedReply",
    "ProtocolError",
    "Setup",
    "TrainReply",
    "TrainTask",
    "fields_of",
    "from_content",
    "to_content",
    "wire_bytes",
]

PROTOCOL = 3
"""Version of the messages; both sides must have the same."""

HELLO = "query.hello"
"""Flower's message type of the handshake; training and evaluation use Flower's own types."""

MAX_REPLY_BYTES = 4 * 1024 * 1024 + 65_536
"""The most a reply may hold: the longest layout that is coded, and room for the rest."""

MAX_TASK_BYTES = 15 * 1024 * 1024
MAX_TEXT = 65_536

PROBLEMS = {
    "": "",
    "protocol": "the site runs another version of FedSigma",
    "fingerprint": "the site's backbone or basis differs from the server's",
    "site-count": "the federation and the study differ in their number of sites",
}
"""Why a site takes no part, as codes: a site sends no sentence of its own."""

_RECORD = "fedsigma"
_KIND = "kind"

T = TypeVar("T")


class ProtocolError(ValueError):
    """A message is not one of FedSigma's, or holds something that is not allowed."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a site needs to know of the study in every message; equal setups can share what was built.

    `layers` is SigmaConfig's layers as JSON. `data` is the data section as JSON in a simulation; it is
    empty for real sites, and a real site ignores it.
    """

    study: str
    backbone: str
    towers: tuple[str, ...]
    layers: str
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    shots: int
    seed: int
    data: str

    @classmethod
    def of(cls, study: StudyConfig) -> Setup:
        """Take from a study what its sites need."""
        return cls(
            study=study.name,
            backbone=study.backbone,
            towers=study.sigma.towers,
            layers=json.dumps(study.sigma.layers),
            parts=study.sigma.parts,
            classes=study.classes,
            prompts=study.prompts,
            shots=study.shots,
            seed=study.seed,
            data="" if study.data is None else json.dumps(asdict(study.data), sort_keys=True),
        )

    def __post_init__(self) -> None:
        _require(len(self.classes) == len(self.prompts) >= 2, "the classes and prompts differ in number")
        _require(self.shots >= 1, f"shots is {self.shots}, expected at least 1")
        _ = self.sigma, self.data_config

    @property
    def sigma(self) -> SigmaConfig:
        """Which weights are adapted."""
        return _from_json(SigmaConfig, {"towers": self.towers, "parts": self.parts}, layers=self.layers)

    @property
    def data_config(self) -> DataConfig | None:
        """Where a simulation's images are; None for real sites."""
        return _from_json(DataConfig, self.data) if self.data else None


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
class Hello:
    """The server asks who is there, and tells its own fingerprint so that the site can compare, too."""

    protocol: int
    setup: Setup
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """A site says its name and fingerprint. sites: the study's number of sites in a simulation, else 0.

    mask_key is its X25519 key for masks in this run, mask_signature its identity's signature of it; empty if
    it has no identity.
    """

    protocol: int
    site: str
    fingerprint: str
    sites: int = 0
    problem: str = ""
    mask_key: bytes = b""
    mask_signature: bytes = b""

    def __post_init__(self) -> None:
        plain_name = 0 < len(self.site) <= 80 and self.site.isprintable() and self.site != "pooled"
        _require(plain_name, "the site's name is empty, too long, reserved or not printable")
        _require(self.problem in PROBLEMS, "the problem is not one of the known ones")
        _require(0 <= self.sites < 2**31, "the number of sites is out of range")
        sizes = len(self.mask_key), len(self.mask_signature)
        _require(sizes in ((0, 0), (32, 64)), "the mask's key or its signature has a wrong length")


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Evaluate the incoming shift, then train it on the site's own images.

    Fields: mode, `round` for a round of the federation or `local` for a site alone, whose shift is not
    averaged; cohort, the number of sites whose shifts are averaged together (1 when alone); first_step,
    steps and total_steps place this training in the whole study's schedule; codec, how to code the change.

    With members, the reply is a `MaskedReply` for this cohort. attempt counts the cohorts of one round from
    0; bound is the largest magnitude of a value that the sum has room for, and most_examples the most images
    that a site counts for.
    """

    setup: Setup
    recipe: TrainingConfig
    mode: str
    round: int
    cohort: int
    first_step: int
    steps: int
    total_steps: int
    codec: str
    evaluate: bool
    shift: bytes
    members: tuple[Member, ...] = ()
    attempt: int = 0
    bound: float = 1.0
    most_examples: int = 1

    def __post_init__(self) -> None:
        fits = 0 <= self.attempt < 2**31 and 1 <= self.most_examples < 2**31 and 0 < self.bound < 2**31
        _require(fits, "attempt, bound or most_examples is out of range")
        _require(self.mode in ("round", "local"), f"mode is '{self.mode}', expected 'round' or 'local'")
        _require(self.round >= 1 and self.cohort >= 1, "round and cohort count from 1")
        fits = 0 <= self.first_step < self.first_step + self.steps <= self.total_steps < 2**31
        _require(fits, f"{self.steps} steps from {self.first_step} do not fit into {self.total_steps}")


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """How training changed the shift, on how many images, and how the incoming shift did.

    change is coded, and counts from the shift as the site decoded it from the task.
    class_counts are the training images of each class; empty unless the site's policy lets it tell them.
    """

    change: bytes
    examples: int
    steps: int
    loss: float
    evaluation: Evaluation
    class_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(1 <= self.examples < 2**31, f"examples is {self.examples}, expected at least 1")
        _require(0 <= self.steps < 2**31, f"steps is {self.steps}")
        _require(math.isfinite(self.loss), "the loss is not finite")
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
    """Evaluate these shifts on the site's test images."""

    setup: Setup
    round: int
    shifts: tuple[bytes, ...]


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


_MESSAGES: dict[type, int] = {
    Hello: MAX_TASK_BYTES,
    HelloReply: MAX_REPLY_BYTES,
    TrainTask: MAX_TASK_BYTES,
    TrainReply: MAX_REPLY_BYTES,
    MaskedReply: MAX_REPLY_BYTES,
    EvaluateTask: MAX_TASK_BYTES,
    EvaluateReply: MAX_REPLY_BYTES,
}


def to_content(message: object) -> RecordDict:
    """Put a message into a Flower record.

    Raises:
        ProtocolError: it is not one of this module's messages, a value is not allowed, or it is too large.
    """
    if type(message) not in _MESSAGES:
        raise ProtocolError(f"{type(message).__name__} is not a message: it must not be sent")
    values = {_KIND: type(message).__name__, **_flatten(message)}
    content = RecordDict({_RECORD: ConfigRecord(values)})
    # Reading it back proves that the receiver will accept it, and that nothing but its fields went in.
    from_content(type(message), content)
    return content


def from_content(cls: type[T], content: RecordDict) -> T:
    """Read a message of an expected kind from a Flower record.

    Raises:
        ProtocolError: the record is of another kind, lacks a field or has one too many, or a value is not of
            its field's type or bounds, or it is too large.
    """
    if set(content.keys()) != {_RECORD} or set(content.config_records.keys()) != {_RECORD}:
        raise ProtocolError(f"the message holds other records than '{_RECORD}'")
    values = dict(content.config_records[_RECORD])
    size = wire_bytes(content)
    if size > _MESSAGES[cls]:
        raise ProtocolError(f"the message has {size} bytes, at most {_MESSAGES[cls]} are allowed")
    kind = values.pop(_KIND, None)
    if kind != cls.__name__:
        raise ProtocolError(f"the message is not a {cls.__name__}")
    message = _build(cls, values, "")
    if values:
        raise ProtocolError(f"the message has {len(values)} fields that a {cls.__name__} does not have")
    return message


def wire_bytes(content: RecordDict) -> int:
    """Return the size of a message: its keys, texts and bytes, and 8 bytes a number (Flower adds framing)."""
    return sum(
        len(key) + _bytes_of(value)
        for record in content.config_records.values()
        for key, value in record.items()
    )


def _bytes_of(value: Any) -> int:
    if isinstance(value, list):
        return sum(_bytes_of(item) for item in value)
    if isinstance(value, bytes):
        return len(value)
    return len(value.encode()) if isinstance(value, str) else 8


def _flatten(message: Any, prefix: str = "") -> dict[str, Any]:
    """Lay the fields of a message, and of the dataclasses in it, side by side as `part.field`."""
    flat: dict[str, Any] = {}
    hints = typing.get_type_hints(type(message))
    for item in fields(message):
        key, value = f"{prefix}{item.name}", getattr(message, item.name)
        inner = _item_type(hints[item.name])
        if is_dataclass(value):
            flat |= _flatten(value, f"{key}.")
        elif inner is not None and is_dataclass(inner):
            for part in fields(inner):
                flat[f"{key}.{part.name}"] = [getattr(one, part.name) for one in value]
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    """Take the fields of a dataclass out of `values`."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name == "section":
            continue
        key, inner = f"{prefix}{name}", _item_type(hint)
        if is_dataclass(hint):
            found[name] = _build(typing.cast(type, hint), values, f"{key}.")
        elif inner is not None and is_dataclass(inner):
            found[name] = _build_many(typing.cast(type, inner), values, f"{key}.")
        elif inner is not None:
            found[name] = tuple(_scalar(key, inner, item) for item in _list(key, values))
        else:
            found[name] = _scalar(key, hint, _take(key, values))
    try:
        return cls(**found)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def _build_many(cls: type, values: dict[str, Any], prefix: str) -> tuple[Any, ...]:
    columns = {item.name: _list(f"{prefix}{item.name}", values) for item in fields(cls)}
    if len({len(column) for column in columns.values()}) != 1:
        raise ProtocolError(f"the columns of '{prefix}' differ in length")
    rows = zip(*columns.values(), strict=True)
    return tuple(_build(cls, dict(zip(columns, row, strict=True)), "") for row in rows)


def _take(key: str, values: dict[str, Any]) -> Any:
    if key not in values:
        raise ProtocolError(f"the message lacks '{key}'")
    return values.pop(key)


def _list(key: str, values: dict[str, Any]) -> list[Any]:
    value = _take(key, values)
    if not isinstance(value, list):
        raise ProtocolError(f"'{key}' is not a list")
    return value


def _scalar(key: str, hint: Any, value: Any) -> Any:
    # `is`, not isinstance: True is an int to Python, and a whole number would pass for a float.
    if type(value) is not hint:
        raise ProtocolError(f"'{key}' is of type {type(value).__name__}, expected {hint.__name__}")
    if hint is str and len(value) > MAX_TEXT:
        raise ProtocolError(f"'{key}' has {len(value)} characters, at most {MAX_TEXT} are allowed")
    return value


def fields_of(content: RecordDict) -> dict[str, Any]:
    """Return the fields of a message as they lie on the wire, for the site's audit log."""
    return dict(content.config_records[_RECORD])


def _item_type(hint: Any) -> Any:
    """Return X for a field of type tuple[X, ...], else None."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _require(condition: bool, words: str) -> None:
    if not condition:
        raise ProtocolError(words)


def _from_json(cls: type[T], values: str | dict[str, Any], **texts: str) -> T:
    try:
        content = json.loads(values) if isinstance(values, str) else dict(values)
        content |= {key: json.loads(text) for key, text in texts.items()}
        return build(cls, content, where="message")
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"the message's {cls.__name__} does not read: {error}") from error
