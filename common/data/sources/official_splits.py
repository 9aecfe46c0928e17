"""Official splits in published files: the CoOp format, and the text files of FGVC-Aircraft."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedsigma.common.data.records import SPLITS, DataError
from fedsigma.common.utils.files import UnsafePath, safe_join

__all__ = ["Row", "read_lists", "read_split_file"]

_MAX_BYTES = 128 * 2**20  # the largest published file, of SUN397, has a few million


@dataclass(frozen=True)
class Row:
    """One image of a split.

    Attributes:
        split: One of SPLITS.
        path: Path below the folder of the images.
        number: Number of the label.
        name: Class name as written in the file.
    """

    split: str
    path: PurePosixPath
    number: int
    name: str


def read_split_file(file: Path) -> list[Row]:
    """Read a JSON file with the keys train, val and test, each a list of [relative path, label, class name].

    Raises:
        DataError: The file is missing or invalid, or a path leads out of its folder.
    """
    try:
        content = json.loads(_read_file(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not set(content) <= set(SPLITS) or "test" not in content:
        raise DataError(f"{file.name} is not a split file: expected the keys {', '.join(SPLITS)}")
    rows = []
    for split in SPLITS:
        items = content.get(split, [])
        if not isinstance(items, list):
            raise DataError(f"{file.name}: {split} is {type(items).__name__}, expected a list")
        rows += [_parse_row(f"{file.name}: {split}[{i}]", split, item) for i, item in enumerate(items)]
    return rows


def read_lists(folder: Path) -> list[Row]:
    """Read FGVC-Aircraft's variants.txt and images_variant_train.txt, _val and _test; images are ID.jpg.

    Raises:
        DataError: A file is missing, or a line names a variant that is not in variants.txt.
    """
    numbers = {name: number for number, name in enumerate(_read_lines(folder / "variants.txt"))}
    rows = []
    for split in SPLITS:
        file = folder / f"images_variant_{split}.txt"
        for line in _read_lines(file):
            image, _, name = line.partition(" ")
            if name not in numbers:
                raise DataError(f"{file.name} has the variant {name!r}, which is not in variants.txt")
            rows.append(_parse_row(file.name, split, [f"{image}.jpg", numbers[name], name]))
    return rows


def _parse_row(where: str, split: str, item: object) -> Row:
    match item:
        case [str(path), int(number), str(name)] if (
            not isinstance(number, bool) and number >= 0 and name.strip()
        ):
            try:
                return Row(split, safe_join(path), number, name)
            except UnsafePath as error:
                raise DataError(f"{where}: {error}") from error
    raise DataError(f"{where} is {str(item)[:80]}, expected [relative path, label number, class name]")


def _read_file(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise DataError(f"{file.name} has {size:,} bytes, expected at most {_MAX_BYTES:,}")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{file.name} is not in {file.parent}: put the official file there") from error
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error


def _read_lines(file: Path) -> list[str]:
    try:
        text = _read_file(file).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
