"""ImageNet's own layout and its offspring: folders named by WordNet ids, or by their place in the list."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fedsigma.common.data.records import DataError, Record
from fedsigma.common.data.sources.folder import SUFFIXES

__all__ = ["CLASS_NAMES", "disambiguate", "read_numbered", "read_wordnet"]

CLASS_NAMES = "classnames.txt"
_ID = re.compile(r"n[0-9]{8}")
_ALL = 1000


def read_wordnet(folder: Path, images: Path, parts: dict[str, str]) -> tuple[list[Record], list[str]]:
    """List the images of folders named by WordNet ids.

    Args:
        folder: the set's folder, with classnames.txt, or with one in ../imagenet.
        images: the folder that keys start from.
        parts: split -> the folder below `images` that holds its class folders ('.' for itself).

    Returns:
        The records, and the classes in the order of their ids.

    Raises:
        DataError: a folder is missing, or the name of a class is not known.
    """
    ids = sorted({name for part in parts.values() for name in _folders(images / part) if _ID.fullmatch(name)})
    if not ids:
        raise DataError(f"{images} has no class folders: expected names such as n01440764")
    names = dict(zip(ids, _names_of(folder, ids), strict=True))
    found = []
    for split, part in parts.items():
        for name in sorted(set(_folders(images / part)) & set(ids)):
            found += _records(images, images / part / name, names[name], split)
    return found, list(names.values())


def read_numbered(folder: Path, images: Path) -> tuple[list[Record], list[str]]:
    """List the test images of folders 0, 1, 2, ..., the places of classes in ImageNet's list.

    Raises:
        DataError: as `read_wordnet`.
    """
    given = _read_names(folder)
    names = (
        disambiguate([given[key] for key in sorted(given)], sorted(given)) if given else _open_clip_names()
    )
    places = sorted(int(name) for name in _folders(images) if name.isascii() and name.isdecimal())
    if not places or places[-1] >= len(names):
        raise DataError(f"{images} has no folders 0 to {len(names) - 1}, one for each class")
    found = []
    for place in places:
        found += _records(images, images / str(place), names[place], "test")
    return found, [names[place] for place in places]


def disambiguate(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Add its mark to a name that an earlier one equals: ImageNet has two classes 'missile'."""
    seen: set[str] = set()
    result = []
    for name, mark in zip(names, marks, strict=True):
        shown = f"{name} ({mark})" if name in seen else name
        seen.add(shown)
        result.append(shown)
    return result


def _names_of(folder: Path, ids: list[str]) -> list[str]:
    given = _read_names(folder)
    if given is None and len(ids) == _ALL:
        return _open_clip_names(ids)
    if given is None:
        raise DataError(
            f"{folder} has no {CLASS_NAMES}, and only {len(ids)} of ImageNet's {_ALL} classes are here: copy"
            " ImageNet's into it"
        )
    if unknown := [key for key in ids if key not in given]:
        raise DataError(f"{CLASS_NAMES} has no name for the folder {unknown[0]}")
    # Marks by the whole list, so that a class has one name in ImageNet and in a part of it.
    whole = dict(
        zip(sorted(given), disambiguate([given[key] for key in sorted(given)], sorted(given)), strict=True)
    )
    return [whole[key] for key in ids]


def _read_names(folder: Path) -> dict[str, str] | None:
    """WordNet id -> class name, from classnames.txt here or beside ImageNet; None where there is none."""
    for file in (folder / CLASS_NAMES, folder.parent / "imagenet" / CLASS_NAMES):
        if file.is_file():
            break
    else:
        return None
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        key, _, name = line.strip().partition(" ")
        if key and (not _ID.fullmatch(key) or not name.strip() or key in found):
            raise DataError(
                f"{CLASS_NAMES} line {number} is {line[:60]!r}, expected 'n01440764 tench', once each"
            )
        if key:
            found[key] = name.strip()
    return found


def _open_clip_names(ids: Sequence[str] = ()) -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    return disambiguate(IMAGENET_CLASSNAMES, ids or [f"class {place}" for place in range(_ALL)])


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: expected one folder for each class in it")
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _records(images: Path, folder: Path, label: str, split: str) -> list[Record]:
    below = folder.relative_to(images).as_posix()
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [
        Record(key=f"{below}/{name}", label=label, split=split)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
