"""Conversion of the messages between server and site to and from Flower records.

A record must have exactly the fields of its dataclass in `messages`, each of its type and within its bounds.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedsigma.common.config.schema import ConfigError, build, to_plain
from fedsigma.common.wire.messages import (
    HANDSHAKE_PROBLEMS,
    LOSS_UNIT,
    MASKED_COUNTS,
    EvaluateReply,
    EvaluateTask,
    Evaluation,
    HandshakeReply,
    HandshakeRequest,
    MaskedReply,
    ProtocolError,
    StudySpec,
    TrainReply,
    TrainTask,
)

__all__ = [
    "HANDSHAKE",
    "HANDSHAKE_PROBLEMS",
    "LOSS_UNIT",
    "MASKED_COUNTS",
    "MAX_REPLY_BYTES",
    "PROTOCOL",
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
    "fields_of",
    "from_record",
    "protocol_version",
    "to_record",
    "wire_bytes",
]

PROTOCOL = 9
"""Version of the messages; both sides must have the same."""

HANDSHAKE = "query.hello"
"""Flower's message type of the handshake; training and evaluation use Flower's own types."""

MAX_REPLY_BYTES = 4 * 1024 * 1024 + 65_536
"""The most a reply may hold: the longest layout that is coded, and room for the rest."""

MAX_TASK_BYTES = 15 * 1024 * 1024
MAX_TEXT = 65_536

_RECORD = "fedsigma"
_KIND = "kind"

T = TypeVar("T")

_MESSAGES: dict[type, int] = {
    HandshakeRequest: MAX_TASK_BYTES,
    HandshakeReply: MAX_REPLY_BYTES,
    TrainTask: MAX_TASK_BYTES,
    TrainReply: MAX_REPLY_BYTES,
    MaskedReply: MAX_REPLY_BYTES,
    EvaluateTask: MAX_TASK_BYTES,
    EvaluateReply: MAX_REPLY_BYTES,
}


def to_record(message: object) -> RecordDict:
    """Put a message into a Flower record.

    Raises:
        ProtocolError: It is not a message, a value is not allowed, or it is too large.
    """
    if type(message) not in _MESSAGES:
        raise ProtocolError(f"{type(message).__name__} is not a message: it must not be sent")
    values = {_KIND: type(message).__name__, **_flatten(message)}
    content = RecordDict({_RECORD: ConfigRecord(values)})
    # Proves that the receiver will accept it.
    from_record(type(message), content)
    return content


def from_record(cls: type[T], content: RecordDict) -> T:
    """Read a message of an expected kind from a Flower record.

    Raises:
        ProtocolError: The record is of another kind or too large, a field is missing or unknown, or a value
            has another type or is out of bounds.
    """
    # Not content.config_records, which Flower builds at each access.
    if set(content.keys()) != {_RECORD} or not isinstance(content[_RECORD], ConfigRecord):
        raise ProtocolError(f"the message holds other records than '{_RECORD}'")
    values = fields_of(content)
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


def protocol_version(content: RecordDict) -> int | None:
    """Return the version of the messages in a handshake reply, whatever else is in it; None without one."""
    record = content.config_records.get(_RECORD)
    version = None if record is None else record.get("protocol")
    return version if type(version) is int else None


def wire_bytes(content: RecordDict) -> int:
    """Return the size of a message: its keys, texts and bytes, and 8 bytes a number (Flower adds framing)."""
    return sum(
        len(key) + _bytes_of(value)
        for record in content.values()
        if isinstance(record, ConfigRecord)
        for key, value in record.items()
    )


def _bytes_of(value: Any) -> int:
    if isinstance(value, list):
        return sum(_bytes_of(item) for item in value)
    if isinstance(value, bytes):
        return len(value)
    return len(value.encode()) if isinstance(value, str) else 8


class _Field(NamedTuple):
    """A field of a message.

    Attributes:
        name: Its name.
        hint: Its type.
        item: X, where the type is tuple[X, ...]; else None.
        nested: Whether the type or X is a dataclass.
        section: The settings class, where the type is one or may be None instead; these travel as JSON.
    """

    name: str
    hint: Any
    item: Any
    nested: bool
    section: Any


def _find_fields(cls: Any) -> tuple[_Field, ...]:
    result = []
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint)
        is_tuple = typing.get_origin(hint) is tuple
        item = options[0] if is_tuple else None
        choices = (hint,) if is_tuple or not options else options
        section = next((choice for choice in choices if hasattr(choice, "section")), None)
        result.append(_Field(name, hint, item, is_dataclass(item or hint), section))
    return tuple(result)


# Finding the fields takes longer than parsing a message.
_fields: Callable[[Any], tuple[_Field, ...]] = cache(_find_fields)


def _flatten(message: Any, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a message, those of nested dataclasses as `part.field`."""
    flat: dict[str, Any] = {}
    for name, _, item, nested, section in _fields(type(message)):
        key, value = f"{prefix}{name}", getattr(message, name)
        if section is not None:
            flat[key] = "" if value is None else json.dumps(to_plain(value), sort_keys=True)
        elif nested and item is None:
            flat |= _flatten(value, f"{key}.")
        elif nested:
            for part in fields(item):
                flat[f"{key}.{part.name}"] = [getattr(row, part.name) for row in value]
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    """Take the fields of a dataclass out of `values`."""
    arguments: dict[str, Any] = {}
    for name, hint, item, nested, section in _fields(cls):
        key = f"{prefix}{name}"
        if section is not None:
            arguments[name] = _build_section(key, section, hint, _scalar(key, str, _take(key, values)))
        elif nested and item is None:
            arguments[name] = _build(hint, values, f"{key}.")
        elif nested:
            arguments[name] = _build_many(item, values, f"{key}.")
        elif item is not None:
            arguments[name] = tuple(_scalar(key, item, value) for value in _list(key, values))
        else:
            arguments[name] = _scalar(key, hint, _take(key, values))
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def _build_section(key: str, section: type, hint: Any, text: str) -> Any:
    """Build a section of settings from its JSON; an empty text is None where that is allowed."""
    if not text and hint is not section:
        return None
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ConfigError("expected keys and values")
        return build(section, content, where=f"'{key}'")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"'{key}' is invalid: {error}") from error


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
    """Return the fields of a message as they are sent, for the audit logs.

    Raises:
        KeyError: It is not a message.
    """
    record = content[_RECORD]
    if not isinstance(record, ConfigRecord):
        raise KeyError(_RECORD)
    return dict(record)
