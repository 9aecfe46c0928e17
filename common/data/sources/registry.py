"""The table of data sources: `kind:place` names a source, one function opens each kind."""

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
"""The modules that register the sources that come with FedSigma, imported when one is first asked for."""
_FOR_EACH = ("labels", "parts", "half")
"""The options that every source has."""


def register_source(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens sources written `name:place`.

    What stands after `name:` fills the function's positional parameters in order, separated by colons: text,
    whole numbers, and last of all `path`, a Path, if there is such a parameter. Keyword-only parameters are
    what a study's `data.options` may hold.

    Raises:
        DataError: the name is taken.
    """

    def add(opener: Opener) -> Opener:
        built_in = _BUILT_IN.get(name, opener.__module__) != opener.__module__
        if name in _SOURCES or built_in:
            raise DataError(f"a data source named '{name}' is registered already: choose another name")
        _SOURCES[name] = opener
        return opener

    return add


def known_sources() -> list[str]:
    """Names of the registered kinds of source."""
    return sorted(_SOURCES.keys() | _BUILT_IN)


def open_source(spec: str, *, base: Path | None = None, **options: Any) -> Source:
    """Open a data source without decoding its pictures.

    Args:
        spec: 'folder:PATH', 'csv:PATH', 'parquet:PATH', 'dicom:PATH', 'coop:NAME:PATH', 'medmnist:NAME:SIZE',
            'demo' or 'demo:seed=1'.
        base: folder that a relative PATH starts from; without it, the current one.
        options: the source's own options, and for every source `labels`, a table from the labels of the
            source to the classes of the study; `parts`, those wanted of 'train', 'val' and 'test'; and
            `half`, 'base' or 'novel', for one half of the classes where a source has an order of them.

    Raises:
        DataError: the kind is unknown, an option is unknown, the place does not exist, or it holds nothing
            that can be read.
    """
    kind, _, place = spec.partition(":")
    if kind in _BUILT_IN and kind not in _SOURCES:
        import_module(_BUILT_IN[kind])
    if kind not in _SOURCES:
        raise DataError(
            f"the data source {spec!r} is of no known kind: write KIND:PATH with one of "
            f"{', '.join(known_sources())}"
        )
    labels, parts, half = (options.pop(name, None) for name in _FOR_EACH)
    source = _open(kind, place, base, options)
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


def _open(kind: str, place: str, base: Path | None, options: dict[str, Any]) -> PictureSource:
    opener = _SOURCES[kind]
    parameters = inspect.signature(opener).parameters
    known = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    places = [one for one in parameters.values() if one.kind is not one.KEYWORD_ONLY]
    if not places and place:
        options = {**_inline(kind, place), **options}
    for name in options:
        if name not in known:
            raise DataError(
                f"the data source '{kind}' has no option {name!r}: known are "
                f"{', '.join(sorted([*known, *_FOR_EACH]))}"
            )
    return opener(*(_placed(kind, place, places, base) if places else ()), **options)


def _placed(kind: str, place: str, places: list[inspect.Parameter], base: Path | None) -> list[Any]:
    """Read what stands after the kind: one value for each parameter, the last taking the rest."""
    form = ":".join([kind, *(one.name.upper() for one in places)])
    words = place.split(":", len(places) - 1) if place else []
    needed = [one for one in places if one.default is one.empty]
    if len(words) < len(needed) or not all(words):
        raise DataError(f"the data source '{kind}' needs a place: write {form}")
    found: list[Any] = []
    for word, one in zip(words, places, strict=False):
        if one.name == "path":
            found.append(_find(kind, word, base))
        elif one.annotation in (int, "int"):
            if not (word.isascii() and word.isdecimal()):
                raise DataError(f"{kind}:{place} has {word!r}, expected a whole number: write {form}")
            found.append(int(word))
        else:
            found.append(word)
    return found


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
