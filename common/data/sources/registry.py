"""Registry of data sources: `kind:location` names a source, one function opens each kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsigma.common.data.records import SPLITS, DataError, PictureSource, Source
from fedsigma.common.data.sampling import base_and_novel

__all__ = ["known_sources", "open_source", "register_source"]

Opener = Callable[..., PictureSource]
_SOURCES: dict[str, Opener] = {}
_BUILT_IN = {
    "coop": "fedsigma.common.data.sources.published",
    "csv": "fedsigma.common.data.sources.csv_manifest",
    "demo": "fedsigma.common.data.synthetic.blood_smears",
    "dicom": "fedsigma.common.data.sources.dicom",
    "folder": "fedsigma.common.data.sources.folder",
    "medmnist": "fedsigma.common.data.sources.medmnist",
    "parquet": "fedsigma.common.data.sources.parquet",
}
"""Modules of the built-in sources, imported at first use."""
_COMMON_OPTIONS = ("labels", "parts", "half")
"""Options of every source."""


def register_source(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens sources named `name:location`.

    The parts of the location, separated by colons, are the positional arguments: text, integers, and last a
    `path`. Keyword-only parameters are the options of a study's `data.options`.

    Raises:
        DataError: The name is registered already.
    """

    def add(opener: Opener) -> Opener:
        built_in = _BUILT_IN.get(name, opener.__module__) != opener.__module__
        if name in _SOURCES or built_in:
            raise DataError(f"a data source named '{name}' is registered already: choose another name")
        _SOURCES[name] = opener
        return opener

    return add


def known_sources() -> list[str]:
    """Return the names of all kinds of source."""
    return sorted(_SOURCES.keys() | _BUILT_IN)


def open_source(spec: str, *, base: Path | None = None, **options: Any) -> Source:
    """Open a data source without decoding its pictures.

    Args:
        spec: 'folder:PATH', 'csv:PATH', 'parquet:PATH', 'dicom:PATH', 'coop:NAME:PATH', 'medmnist:NAME:SIZE',
            'demo' or 'demo:seed=1'.
        base: Folder that a relative PATH starts from; None for the current folder.
        options: The source's own options, and for every source `labels`, a table from the source's labels to
            the study's classes; `parts`, a selection of 'train', 'val' and 'test'; and `half`, 'base' or
            'novel', for one half of the classes where a source has an order of them.

    Raises:
        DataError: The kind or an option is unknown, the location does not exist, or contains no records.
    """
    kind, _, location = spec.partition(":")
    if kind in _BUILT_IN and kind not in _SOURCES:
        import_module(_BUILT_IN[kind])
    if kind not in _SOURCES:
        raise DataError(
            f"the data source {spec!r} is of no known kind: write KIND:PATH with one of "
            f"{', '.join(known_sources())}"
        )
    labels, parts, half = (options.pop(name, None) for name in _COMMON_OPTIONS)
    source = _open(kind, location, base, options)
    if parts is not None:
        _keep_parts(source, parts)
    if half is not None:
        _keep_half(source, spec, half)
    if labels is not None:
        if not isinstance(labels, dict):
            raise DataError(f"the option labels is {labels!r}, expected a table 'label: class'")
        table = {str(old): str(new) for old, new in labels.items()}
        source.records = [replace(r, label=table.get(r.label or "", r.label)) for r in source.records]
    return source


def _keep_parts(source: PictureSource, parts: Any) -> None:
    if not isinstance(parts, list | tuple) or not parts or not set(parts) <= set(SPLITS):
        raise DataError(f"the option parts is {parts!r}, expected a list of {', '.join(SPLITS)}")
    source.parts = tuple(parts)
    source.records = [record for record in source.records if record.split in parts]


def _keep_half(source: PictureSource, spec: str, half: Any) -> None:
    if half not in ("base", "novel"):
        raise DataError(f"the option half is {half!r}, expected base or novel")
    if not source.classes:
        raise DataError(f"the option half needs an order of classes, and {spec} has none: leave half out")
    source.classes = base_and_novel(source.classes)[half == "novel"]
    kept = set(source.classes)
    source.records = [record for record in source.records if record.label in kept]


def _open(kind: str, location: str, base: Path | None, options: dict[str, Any]) -> PictureSource:
    opener = _SOURCES[kind]
    parameters = inspect.signature(opener).parameters.values()
    option_names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if not positional and location:
        options = {**_parse_options(kind, location), **options}
    for name in options:
        if name not in option_names:
            raise DataError(
                f"the data source '{kind}' has no option {name!r}: known are "
                f"{', '.join(sorted([*option_names, *_COMMON_OPTIONS]))}"
            )
    return opener(*(_parse_location(kind, location, positional, base) if positional else ()), **options)


def _parse_location(
    kind: str, location: str, parameters: list[inspect.Parameter], base: Path | None
) -> list[Any]:
    """Parse a location into one value for each parameter; the last takes the rest."""
    form = ":".join([kind, *(p.name.upper() for p in parameters)])
    parts = location.split(":", len(parameters) - 1) if location else []
    if len(parts) < sum(p.default is p.empty for p in parameters) or not all(parts):
        raise DataError(f"the data source '{kind}' needs a location: write {form}")
    values: list[Any] = []
    for part, parameter in zip(parts, parameters, strict=False):
        if parameter.name == "path":
            path = (base or Path()) / Path(part).expanduser()
            if not path.exists():
                raise DataError(f"the data source '{kind}:{part}' does not exist: searched {path.absolute()}")
            values.append(path)
        elif parameter.annotation in (int, "int"):
            if not (part.isascii() and part.isdecimal()):
                raise DataError(f"{kind}:{location} has {part!r}, expected a whole number: write {form}")
            values.append(int(part))
        else:
            values.append(part)
    return values


def _parse_options(kind: str, text: str) -> dict[str, Any]:
    """Parse `seed=1,train=4` as options with integer values."""
    options: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not value.strip().lstrip("-").isdigit():
            raise DataError(
                f"the data source '{kind}:{text}' has {item!r}, expected options such as {kind}:seed=1"
            )
        options[name.strip()] = int(value)
    return options
