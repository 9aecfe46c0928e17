"""Published data sets with their cards and official splits: `coop:NAME:FOLDER`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from fedsigma.common.data.catalog.card import DatasetCard, card, prompt_of, same_name
from fedsigma.common.data.records import DataError, PictureSource, Record
from fedsigma.common.data.sources.imagenet import disambiguate, read_numbered, read_wordnet
from fedsigma.common.data.sources.official_splits import Row, read_lists, read_split_file
from fedsigma.common.data.sources.registry import register_source

__all__ = ["SITES", "images_folder", "open_card", "open_coop", "read_rows"]

SITES = "sites.csv"
"""Optional file in the folder of a set: the site of each image."""


@register_source("coop")
def open_coop(name: str, path: Path) -> PictureSource:
    """Open a published set with its official split and its class names for prompts.

    The classes are in the order of the set's label numbers. A file sites.csv with the columns path (below the
    folder of the images) and site adds the sites, which no published split contains.

    Args:
        name: Name of the card, such as btmri; `fedsigma data cards` lists them.
        path: Folder of the set, as described by the card.

    Raises:
        ConfigError: There is no such card.
        DataError: The folder or its split file does not match the card.
    """
    return open_card(card(name), path)


def open_card(chosen: DatasetCard, path: Path) -> PictureSource:
    """Open the set of a card, as `open_coop`."""
    if not path.is_dir():
        raise DataError(f"{path} is a file, expected the folder of {chosen.title}")
    root = images_folder(chosen, path)
    records, classes = _read(chosen, path, root)
    records = _with_sites(path / SITES, records)
    return PictureSource(records, lambda key: Image.open(root / key), classes=tuple(classes))


def _with_sites(file: Path, records: list[Record]) -> list[Record]:
    """Return the records with the sites of a file; unchanged without the file."""
    if not file.is_file():
        return records
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            if not {"path", "site"} <= set(rows.fieldnames or ()):
                raise DataError(f"{file} has the columns {rows.fieldnames}, expected path and site")
            site_of = {row["path"]: row["site"] for row in rows if row["site"]}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error}): expected a CSV file in UTF-8") from error
    return [replace(record, site=site_of.get(record.key)) for record in records]


def images_folder(chosen: DatasetCard, path: Path) -> Path:
    """Return the folder that paths of a split start from: the inner one if it exists."""
    inner = path / chosen.layout.images
    return inner if inner.is_dir() else path


def read_rows(chosen: DatasetCard, path: Path) -> list[Row]:
    """Read the official split of a set with split files; raises DataError also for an empty split."""
    layout = chosen.layout
    rows = read_lists(path) if layout.kind == "lists" else read_split_file(path / layout.split)
    if not rows:
        raise DataError(f"the split of {chosen.title} names no image")
    return rows


def _read(chosen: DatasetCard, path: Path, root: Path) -> tuple[list[Record], list[str]]:
    match chosen.layout.kind:
        case "imagenet":
            return read_wordnet(path, root, {"train": "train", "test": "val"})
        case "wordnet":
            return read_wordnet(path, root, {"test": "."})
        case "numbered":
            return read_numbered(path, root)
    rows = read_rows(chosen, path)
    names = class_names(chosen, rows)

    @cache
    def find_folder(folder: PurePosixPath) -> PurePosixPath:
        """Return the name of a folder on disk, ignoring case, blanks, '_' and '-' if only one matches."""
        if not folder.parts:
            return folder
        above = find_folder(folder.parent)
        alike = []
        if not (root / above / folder.name).is_dir() and (root / above).is_dir():
            alike = [
                path.name
                for path in (root / above).iterdir()
                if same_name(path.name) == same_name(folder.name) and path.is_dir()
            ]
        return above / (alike[0] if len(alike) == 1 else folder.name)

    records = [
        Record(
            key=(find_folder(row.path.parent) / row.path.name).as_posix(),
            label=names[row.number],
            split=row.split,
        )
        for row in rows
    ]
    return records, list(names.values())


def class_names(chosen: DatasetCard, rows: Sequence[Row]) -> dict[int, str]:
    """Return the class name for prompts of each label number, in the order of the numbers.

    Names are spelled as on the card if it has the class, else as in the split file.

    Raises:
        DataError: A number has two names.
    """
    written: dict[int, str] = {}
    for row in rows:
        first = written.setdefault(row.number, row.name)
        if first != row.name and same_name(first) != same_name(row.name):
            raise DataError(
                f"the label {row.number} is called '{first}' and '{row.name}': the split file is damaged"
            )
    spelling = {same_name(name): name for name in chosen.class_names}
    numbers = sorted(written)
    prompts = [spelling.get(same_name(written[number]), prompt_of(written[number])) for number in numbers]
    return dict(zip(numbers, disambiguate(prompts, [f"label {number}" for number in numbers]), strict=True))
