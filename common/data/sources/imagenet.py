"""Layouts of ImageNet and its variants: folders named by WordNet ids, or by their position in the list."""

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
_CLASSES = 1000


def read_wordnet(folder: Path, images: Path, parts: dict[str, str]) -> tuple[list[Record], list[str]]:
    """List the images of folders named by WordNet ids; return the records, and the classes by id.

    Args:
        folder: The set's folder, with classnames.txt, or with one in ../imagenet.
        images: The folder that keys start from.
        parts: Split -> the folder below `images` with its class folders ('.' for itself).

    Raises:
        DataError: A folder is missing, or the name of a class is unknown.
    """
    ids = sorted({name for part in parts.values() for name in _folders(images / part) if _ID.fullmatch(name)})
    if not ids:
        raise DataError(f"{images} has no class folders: expected names such as n01440764")
    names = dict(zip(ids, _class_names(folder, ids), strict=True))
    records: list[Record] = []
    for split, part in parts.items():
        for name in sorted(set(_folders(images / part)) & set(ids)):
            records += _records(images, images / part / name, names[name], split)
    return records, list(names.values())


def read_numbered(folder: Path, images: Path) -> tuple[list[Record], list[str]]:
    """List the test images of folders 0, 1, 2, ..., the positions of classes in ImageNet's list."""
    names = list((_read_names(folder) or {}).values()) or _open_clip_names()
    numbers = sorted(int(name) for name in _folders(images) if name.isascii() and name.isdecimal())
    if not numbers or numbers[-1] >= len(names):
        raise DataError(f"{images} has no folders 0 to {len(names) - 1}, one for each class")
    records: list[Record] = []
    for number in numbers:
        records += _records(images, images / str(number), names[number], "test")
    return records, [names[number] for number in numbers]


def disambiguate(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Append its mark to a name that occurs before: ImageNet has two classes 'missile'."""
    seen: set[str] = set()
    result = []
    for name, mark in zip(names, marks, strict=True):
        result.append(f"{name} ({mark})" if name in seen else name)
        seen.add(result[-1])
    return result


def _class_names(folder: Path, ids: list[str]) -> list[str]:
    names = _read_names(folder)
    if names is None and len(ids) == _CLASSES:
        return _open_clip_names(ids)
    if names is None:
        raise DataError(
            f"{folder} has no {CLASS_NAMES}, and only {len(ids)} of ImageNet's {_CLASSES} classes are here:"
            " copy ImageNet's into it"
        )
    if unknown := [key for key in ids if key not in names]:
        raise DataError(f"{CLASS_NAMES} has no name for the folder {unknown[0]}")
    return [names[key] for key in ids]


def _read_names(folder: Path) -> dict[str, str] | None:
    """Read classnames.txt here or beside ImageNet: WordNet id -> class name, sorted; None without a file.

    Names are made distinct over the whole list, so that a class has one name in ImageNet and in a part of it.
    """
    files = (folder / CLASS_NAMES, folder.parent / "imagenet" / CLASS_NAMES)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    names = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        key, _, name = line.strip().partition(" ")
        if key and (not _ID.fullmatch(key) or not name.strip() or key in names):
            raise DataError(
                f"{CLASS_NAMES} line {number} is {line[:60]!r}, expected 'n01440764 tench', once each"
            )
        if key:
            names[key] = name.strip()
    ids = sorted(names)
    return dict(zip(ids, disambiguate([names[key] for key in ids], ids), strict=True))


def _open_clip_names(ids: Sequence[str] = ()) -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    return disambiguate(IMAGENET_CLASSNAMES, ids or [f"class {number}" for number in range(_CLASSES)])


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: expected one folder for each class in it")
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _records(images: Path, folder: Path, label: str, split: str) -> list[Record]:
    prefix = folder.relative_to(images).as_posix()
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    return [
        Record(key=f"{prefix}/{name}", label=label, split=split)
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
    ]
