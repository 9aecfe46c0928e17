"""The table of data sources: `kind:place` names a source, one function opens each kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsigma.common.data.records import DataError, Pictures, Source

__all__ = ["known_sources", "open_source", "register_source"]

Opener = Callable[..., Pictures]
_SOURCES: dict[str, Opener] = {}


def register_source(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens sources written `name:place`.

    The function takes a Path, if a parameter is called `path`, and any keyword-only options; their names and
    annotations are what a study's `data.options` may hold.

    Raises:
        DataError: the name is taken.
    """

    def add(opener: Opener) -> Opener:
        if name in _SOURCES:
            raise DataError(f"a data source named '{name}' is registered already: choose another name")
        _SOURCES[name] = opener
        return opener

    return add


def known_sources() -> list[str]:
    """Names of the registered kinds of source."""
    return sorted(_SOURCES)


def open_source(spec: str, *, base: Path | None = None, **options: Any) -> Source:
    """Open a data source without decoding its pictures.

    Args:
        spec: 'folder:PATH', 'csv:PATH', 'parquet:PATH', 'dicom:PATH', 'demo' or 'demo:seed=1'.
        base: folder that a relative PATH starts from; without it, the current one.
        options: the source's own options, and for every source `labels`, a table from the labels of the
            source to the classes of the study.

    Raises:
        DataError: the kind is unknown, an option is unknown, the place does not exist, or it holds nothing
            that can be read.
    """
    kind, _, place = spec.partition(":")
    if kind not in _SOURCES:
        raise DataError(
            f"the data source {spec!r} is of no known kind: write KIND:PATH with one of "
            f"{', '.join(known_sources())}"
        )
    labels = options.pop("labels", None)
    source = _open(kind, place, base, options)
    if labels is not None:
        if not isinstance(labels, dict):
            raise DataError(f"the option labels is {labels!r}, expected a table 'label: class'")
        table = {str(old): str(new) for old, new in labels.items()}
        source.records = [replace(r, label=table.get(r.label or "", r.label)) for r in source.records]
    return source


def _open(kind: str, place: str, base: Path | None, options: dict[str, Any]) -> Pictures:
    opener = _SOURCES[kind]
    parameters = inspect.signature(opener).parameters
    known = [name for name in parameters if name != "path"]
    if "path" not in parameters and place:
        options = {**_inline(kind, place), **options}
    for name in options:
        if name not in known:
            raise DataError(
                f"the data source '{kind}' has no option {name!r}: known are "
                f"{', '.join(sorted([*known, 'labels']))}"
            )
    if "path" not in parameters:
        return opener(**options)
    if not place:
        raise DataError(f"the data source '{kind}' needs a place: write {kind}:PATH")
    return opener(_find(kind, place, base), **options)


def _inline(kind: str, text: str) -> dict[str, Any]:
    """Read `seed=1,train=4` as options with whole numbers."""
    found: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not value.strip().lstrip("-").isdigit():
            raise DataError(
                f"the data source '{kind}:{text}' has {item!r}, expected options such as {kind}:seed=1"
            )
        found[name.strip()] = int(value)
    return found


def _find(kind: str, place: str, base: Path | None) -> Path:
    path = (base or Path()) / Path(place).expanduser()
    if not path.exists():
        raise DataError(f"the data source '{kind}:{place}' does not exist: looked for {path.absolute()}")
    return path
