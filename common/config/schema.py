"""Settings classes and their YAML: strict types, bounds beside fields, and errors that say what to change."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "ConfigError",
    "build",
    "check_choice",
    "check_number",
    "check_printable",
    "did_you_mean",
    "flatten",
    "json_schema",
    "local_address",
    "read_yaml",
    "settings",
    "split_address",
    "to_plain",
    "write_yaml",
]

T = TypeVar("T")

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_BOUNDS = ("greater_than_equal", "less_than_equal", "finite_number")
# What a field expects, by the type of pydantic's error.
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "dataclass_type": "keys and values",
    "dataclass_exact_type": "keys and values",
    "tuple_type": "a list",
}


class ConfigError(FedSigmaError, ValueError):
    """A settings file is invalid."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" for the nearest choice, or the list of choices."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'?" if close else f": known are {', '.join(choices)}"


def check_number(where: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a number outside its bounds, or one that is not finite."""
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ConfigError(f"{where} is {value!r}, expected a number {bounds}")


def check_choice(where: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise ConfigError(f"{where} is '{value}', which is not known{did_you_mean(str(value), choices)}")


def check_printable(where: str, value: str) -> None:
    """Refuse text that is blank or holds control characters, which would get into logs and reports."""
    if not value.strip() or not value.isprintable():
        raise ConfigError(f"{where} is {value!r}, expected printable text on one line")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key, such as federation.rounds, and the value of each of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def local_address(address: str, *, where: str) -> str:
    """Return the HOST:PORT at which this machine reaches a listening address, which may be 0.0.0.0 or ::."""
    host, port = split_address(address, where=where)
    return f"{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"


def split_address(address: str, *, where: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Raises:
        ConfigError: The address has another form.
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"{where} is '{address}', expected HOST:PORT, such as fl.example.org:443")
    return match[1].strip("[]"), int(match[2])


class _Loader(yaml.SafeLoader):
    """YAML's safe subset; reads `1e-3` as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, typing.Hashable):
                if key in keys:
                    raise ConfigError(f"'{key}' is written twice (line {key_node.start_mark.line + 1})")
                keys.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text such as `1e3` is quoted, and control characters are escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: The text is not a YAML mapping.
    """
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {type(content).__name__}, expected keys and values")
    return content


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class of annotated fields a frozen, keyword-only dataclass that validates its values.

    Values are not converted, except a whole number to a float and a list to a tuple. A field of another
    settings class also takes a mapping. Class variables: `section` is the section's name, which errors put
    before a key; `renamed` maps old keys to new ones, which errors name. The docstring below a field
    describes it in the JSON Schema.

    Raises:
        ConfigError: When an instance is made with an unknown or missing key, or with an invalid value.
    """
    cls.__get_pydantic_core_schema__ = classmethod(_accept_mapping)  # type: ignore[attr-defined]
    settings_class = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    check = settings_class.__init__

    @functools.wraps(check)
    def init(self: Any, **values: Any) -> None:
        try:
            check(self, **values)
        except pydantic.ValidationError as error:
            raise _explain(type(self), error) from None

    settings_class.__init__ = init  # type: ignore[method-assign]
    return typing.cast(type[T], settings_class)


def _accept_mapping(cls: type, source: Any, handler: pydantic.GetCoreSchemaHandler) -> core_schema.CoreSchema:
    def build_section(value: Any) -> Any:
        return _make(cls, value) if isinstance(value, Mapping) else value

    return core_schema.no_info_before_validator_function(build_section, handler(source))


def build(cls: type[T], content: Mapping[str, Any], *, where: str) -> T:
    """Build settings from plain values.

    Args:
        cls: A class decorated with `settings`.
        content: Values by key.
        where: File or other source of the values, for errors.

    Raises:
        ConfigError: A key is unknown (the error suggests the nearest one) or missing, or a value is invalid.
    """
    try:
        return _make(cls, content)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error


def _make(cls: type[T], content: Mapping[Any, Any]) -> T:
    if odd := [key for key in content if not isinstance(key, str)]:
        raise _unknown_key(cls, odd[0])
    return cls(**content)


class _SchemaWithDocstrings(GenerateJsonSchema):
    """Describes each field by the docstring below it."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        result = super().dataclass_schema(schema)
        for cls in filter(is_dataclass, reversed(schema["cls"].__mro__)):
            (definition,) = ast.parse(inspect.getsource(cls)).body
            assert isinstance(definition, ast.ClassDef)
            for statement, docstring in itertools.pairwise(definition.body):
                match statement, docstring:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        result["properties"][name]["description"] = " ".join(text.split())
        return result


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a settings class, for editors and validators."""
    schema = pydantic.TypeAdapter(cls).json_schema(schema_generator=_SchemaWithDocstrings)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _explain(cls: type, error: pydantic.ValidationError) -> ConfigError:
    """Return the first problem of a validation as one sentence: key, value, what was expected."""
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "unexpected_keyword_argument":
            return _unknown_key(cls, problem["loc"][0])
    missing = [f"'{_key(cls, problem['loc'][0])}'" for problem in problems if problem["type"] == "missing"]
    if missing:
        return ConfigError(f"{', '.join(missing)} is missing")
    cause = problems[0].get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    name = str(problems[0]["loc"][0])
    # A field of several types has a problem for each; those of a list's items are the most exact.
    problems = [problem for problem in problems if problem["loc"][0] == name]
    depth = max(len(problem["loc"]) for problem in problems)
    problems = [problem for problem in problems if len(problem["loc"]) == depth]
    key, value, loc = _key(cls, name), problems[0]["input"], problems[0]["loc"]
    if loc[-1] == "[key]":
        return ConfigError(f"{key} has a key that is not text: put it in quotes")
    if depth > 1 and typing.get_origin(_field(cls, name).annotation) is dict:
        key = f"{key}.{loc[1]}"
    expected = [_expected(cls, name, problem) for problem in problems]
    if len(set(expected)) > 1:
        expected = [f"expected {' or '.join(_WORDS.get(p['type'], p['msg']) for p in problems)}"]
    value = list(value) if isinstance(value, tuple) else value
    return ConfigError(f"{key} is {'empty' if value == [] else repr(value)}, {expected[0]}")


def _unknown_key(cls: type, key: Any) -> ConfigError:
    renamed = getattr(cls, "renamed", {})
    if key in renamed:
        return ConfigError(f"the key '{_key(cls, key)}' is now called '{_key(cls, renamed[key])}'")
    names = list(vars(cls)["__pydantic_fields__"])
    return ConfigError(f"the key '{_key(cls, key)}' is not known{did_you_mean(str(key), names)}")


def _key(cls: type, name: Any) -> str:
    section = getattr(cls, "section", "")
    return f"{section}.{name}" if section else str(name)


def _expected(cls: Any, name: str, problem: Any) -> str:
    """Return the second half of an error: what was expected."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _BOUNDS:
        low, high = _bound(cls, name, "ge"), _bound(cls, name, "le")
        if high is not None:
            return f"expected a number between {low or 0:g} and {high:g}"
        return "expected a finite number" if low is None else f"expected a number at least {low:g}"
    if kind == "too_short":
        return f"expected at least {context['min_length']} of them"
    if kind == "value_error":
        return str(context["error"])
    hint = ": put it in quotes if it is meant as text" if kind == "string_type" else ""
    return f"expected {_WORDS[kind]}{hint}" if kind in _WORDS else problem["msg"]


def _bound(cls: type, name: str, key: str) -> float | None:
    bounds = (getattr(item, key, None) for item in _field(cls, name).metadata)
    return next((bound for bound in bounds if bound is not None), None)


def _field(cls: type, name: str) -> pydantic.fields.FieldInfo:
    return typing.cast(pydantic.fields.FieldInfo, vars(cls)["__pydantic_fields__"][name])


def write_yaml(settings: Any) -> str:
    """Write settings as YAML that `read_yaml` and `build` read."""
    return yaml.dump(to_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_plain(value: Any) -> Any:
    """Turn settings into mappings, lists and scalars; optional sections that are None are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        items = {field.name: getattr(value, field.name) for field in fields(value)}
        return {
            name: to_plain(item)
            for name, item in items.items()
            if item is not None or not any(map(is_dataclass, typing.get_args(hints[name])))
        }
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value
