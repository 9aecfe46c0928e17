"""Official splits as published files say them: the CoOp form, and FGVC-Aircraft's text files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedsigma.common.data.records import SPLITS, DataError
from fedsigma.common.utils.files import UnsafePath, safe_join

__all__ = ["Row", "read_lists", "read_split_file"]

_LARGEST = 128 * 2**20  # bytes; SUN397's, the largest published, has a few million


@dataclass(frozen=True)
class Row:
    """One image of a split: its path below the images' folder, its label's number and name as written."""

    split: str
    path: PurePosixPath
    number: int
    name: str


def read_split_file(file: Path) -> list[Row]:
    """Read a JSON file with the keys train, val and test, each a list of [relative path, label, class name].

    Raises:
        DataError: there is no such file, it is not of this form, or a path leads out of its folder.
    """
    content = _load(file)
    if not isinstance(content, dict) or not set(content) <= set(SPLITS) or "test" not in content:
        raise DataError(f"{file.name} is no split file: expected the keys {', '.join(SPLITS)}")
    rows = []
    for split in SPLITS:
        items = content.get(split, [])
        if not isinstance(items, list):
            raise DataError(f"{file.name}: {split} is {type(items).__name__}, expected a list")
        rows += [_row(f"{file.name}: {split}[{place}]", split, item) for place, item in enumerate(items)]
    return rows


def _load(file: Path) -> object:
    try:
        if file.stat().st_size > _LARGEST:
            raise DataError(f"{file.name} has {file.stat().st_size:,} bytes, expected at most {_LARGEST:,}")
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{file.name} is not in {file.parent}: put the official split file there") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file.name} cannot be read as JSON: {error}") from error


def _row(where: str, split: str, item: object) -> Row:
    match item:
        case [str(path), int(number), str(name)] if (
            not isinstance(number, bool) and number >= 0 and name.strip()
        ):
            try:
                return Row(split, safe_join(path), number, name)
            except UnsafePath as error:
                raise DataError(f"{where}: {error}") from error
    raise DataError(f"{where} is {str(item)[:80]}, expected [relative path, label number, class name]")


def read_lists(folder: Path) -> list[Row]:
    """Read FGVC-Aircraft's variants.txt and images_variant_train.txt, _val and _test; images are ID.jpg.

    Raises:
        DataError: a file is missing, or a line names a variant that variants.txt does not.
    """
    numbers = {name: number for number, name in enumerate(_lines(folder / "variants.txt"))}
    rows = []
    for split in SPLITS:
        file = folder / f"images_variant_{split}.txt"
        for line in _lines(file):
            image, _, name = line.partition(" ")
            if name not in numbers:
                raise DataError(f"{file.name} has the variant {name!r}, which variants.txt has not")
            rows.append(_row(file.name, split, [f"{image}.jpg", numbers[name], name]))
    return rows


def _lines(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file.name} is not in {file.parent}: put the official one there") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error
    return (line.strip() for line in text.splitlines() if line.strip())
