"""Types of settings fields: each has its check, the end of its error, and its part of the JSON Schema.

A check raises ValueError with the end of a sentence that begins "KEY is VALUE, ".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from fedsigma.common.config.schema import ConfigError, did_you_mean, split_address

__all__ = [
    "Address",
    "Check",
    "Line",
    "ListOf",
    "OptionalAddress",
    "Sha256",
    "distinct",
    "matching",
    "one_of",
]

T = TypeVar("T")

ListOf = Annotated[tuple[T, ...], pydantic.Strict(False)]
"""A list in YAML, a tuple in Python."""


@dataclass(frozen=True)
class Check:
    """Annotation of a field that checks its value.

    Attributes:
        check: Raises ValueError if the value is invalid.
        keywords: Keywords for the field's JSON Schema.
    """

    check: Callable[[Any], None]
    keywords: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def run(value: Any) -> Any:
            self.check(value)
            return value

        return core_schema.no_info_after_validator_function(run, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), **self.keywords}


def one_of(words: tuple[str, ...]) -> Check:
    """Return a check that a text is one of these words."""

    def check(value: str) -> None:
        if value not in words:
            raise ValueError(f"which is not known{did_you_mean(value, words)}")

    return Check(check, {"enum": list(words)})


def matching(pattern: str, expected: str) -> Check:
    """Return a check that a text matches a regular expression, with a description of the expected text."""

    def check(value: str) -> None:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")

    return Check(check, {"pattern": f"^({pattern})$"})


def _check_distinct(values: tuple[Any, ...]) -> None:
    if len(set(values)) != len(values):
        raise ValueError("which names something twice")


def _check_line(value: str) -> None:
    if not value.strip() or not value.isprintable():
        raise ValueError("expected printable text on one line")


def _check_address(value: str) -> None:
    try:
        split_address(value, where="it")
    except ConfigError:
        raise ValueError("expected HOST:PORT, such as fl.example.org:443") from None


def _check_optional_address(value: str) -> None:
    if value:
        _check_address(value)


distinct = Check(_check_distinct, {"uniqueItems": True})
"""A list in which nothing is repeated."""

Line = Annotated[str, Check(_check_line, {"minLength": 1})]
"""Printable text on one line."""

Address = Annotated[str, Check(_check_address, {"pattern": ":[0-9]{1,5}$"})]
"""HOST:PORT."""

OptionalAddress = Annotated[str, Check(_check_optional_address, {"pattern": "^$|:[0-9]{1,5}$"})]
"""HOST:PORT, or empty."""

Sha256 = Annotated[str, matching("[0-9a-f]{64}", "64 hex digits")]
"""A SHA-256 or another 256-bit value in hexadecimal."""
