"""Reading YAML into small dataclasses, strictly: unknown keys and wrong types are errors that help."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

import yaml

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "ConfigError",
    "build",
    "check_choice",
    "check_number",
    "check_printable",
    "check_subset",
    "did_you_mean",
    "flatten",
    "read_yaml",
    "resolve_relative",
    "split_address",
    "write_yaml",
]

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "keys and values",
    tuple: "a list",
    type(None): "nothing",
}


# Sections that are there or not: an empty one is not written.
_LEFT_OUT = ("data", "personal")


class ConfigError(FedSigmaError, ValueError):
    """A study or site file holds something that is not allowed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" for the nearest known word, or the list of known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'?" if close else f": known are {', '.join(known)}"


def check_number(where: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a number outside its bounds, or one that is not finite."""
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ConfigError(f"{where} is {value!r}, expected a number {bounds}")


def check_choice(where: str, value: str, known: Iterable[str]) -> None:
    """Refuse a word that is not among the known ones."""
    if value not in known:
        raise ConfigError(f"{where} is '{value}', which is not known{did_you_mean(str(value), known)}")


def check_printable(where: str, value: str) -> None:
    """Refuse text that is blank or holds control characters."""
    # A line break or control character in a name would end up in logs, prompts and reports.
    if not value.strip() or not value.isprintable():
        raise ConfigError(f"{where} is {value!r}, expected printable text on one line")


def check_subset(where: str, values: tuple[str, ...], known: tuple[str, ...], *, empty: bool = False) -> None:
    """Refuse unknown or repeated words, and (unless allowed) an empty list."""
    for value in values:
        check_choice(where, value, known)
    if len(set(values)) != len(values):
        raise ConfigError(f"{where} names something twice: {list(values)}")
    if not values and not empty:
        raise ConfigError(f"{where} is empty, expected at least one of {', '.join(known)}")


def flatten(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Each of nested settings by its path, as federation.rounds, with its value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def resolve_relative(address: str, *, where: str) -> str:
    """How this machine reaches what listens at HOST:PORT, which may be all of its addresses.

    Raises:
        ConfigError: as `split_address`.
    """
    host, port = split_address(address, where=where)
    return f"{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"


def split_address(address: str, *, where: str) -> tuple[str, int]:
    """Split host:port.

    Raises:
        ConfigError: it is not of this form.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"{where} is '{address}', expected HOST:PORT, such as fl.example.org:443")
    return found[1].strip("[]"), int(found[2])


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with `1e-3` read as a number and a key written twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable) and key in seen:
                raise ConfigError(f"'{key}' is written twice (line {key_node.start_mark.line + 1})")
            if isinstance(key, typing.Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: a text like `1e3` is put in quotes."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the text is not YAML, or not a mapping.
    """
    try:
        # _Loader derives from SafeLoader: it builds plain values only.
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {type(content).__name__}, expected keys and values")
    return content


def build(cls: type[T], content: Mapping[str, Any], *, where: str) -> T:
    """Build a settings dataclass from plain values, refusing unknown keys and wrong types.

    A class may have a table `renamed` from old keys to new ones, which the error then names.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named) or missing, or a value is not allowed.
    """
    section = getattr(cls, "section", "")
    prefix = f"{section}." if section else ""
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    try:
        for key, value in content.items():
            if key in (renamed := getattr(cls, "renamed", {})):
                raise ConfigError(f"the key '{prefix}{key}' is now called '{prefix}{renamed[key]}'")
            if key not in known:
                raise ConfigError(f"the key '{prefix}{key}' is not known{did_you_mean(str(key), known)}")
            values[key] = _convert(f"{prefix}{key}", hints[key], value, where)
        return cls(**values)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error
    except TypeError as error:
        # The only TypeError left is a required field that was not given.
        missing = ", ".join(f"'{prefix}{name}'" for name in _required(cls) if name not in values)
        raise ConfigError(f"{where}: {missing or error} is missing") from error


def _required(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def _convert(key: str, hint: Any, value: Any, where: str) -> Any:
    """Bring one value to its field's type, or say what was expected."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in (option for option in options if option is not type(None)):
            try:
                return _convert(key, option, value, where)
            except ConfigError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        raise ConfigError(f"{key} is {value!r}, expected {' or '.join(_say(option) for option in options)}")
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}, expected keys and values")
        return build(typing.cast(type, hint), value, where=where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} is {value!r}, expected a list")
        return tuple(_convert(key, typing.get_args(hint)[0], item, where) for item in value)
    return _scalar(key, hint, value)


def _scalar(key: str, hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, origin) and not (origin in (int, float) and isinstance(value, bool)):
        if origin is dict:
            if not all(isinstance(name, str) for name in value):
                raise ConfigError(f"{key} has a key that is not text: put it in quotes")
            return dict(value)
        return value
    hint_text = ": put it in quotes if it is meant as text" if origin is str else ""
    raise ConfigError(f"{key} is {value!r}, expected {_say(hint)}{hint_text}")


def _say(hint: Any) -> str:
    """Say in words what a field expects."""
    return _WORDS.get(typing.get_origin(hint) or hint, str(hint))


def write_yaml(settings: Any) -> str:
    """Write settings as YAML that `read_yaml` and `build` turn back into equal ones."""
    return yaml.dump(to_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_plain(value: Any) -> Any:
    """Turn settings into what YAML can hold: mappings, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        items = {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
        return {key: item for key, item in items.items() if item is not None or key not in _LEFT_OUT}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value
