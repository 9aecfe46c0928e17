"""Compares a folder with a data set card, without decoding pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedsigma.common.data.catalog.card import DatasetCard, same_name
from fedsigma.common.data.records import SPLITS, DataError, Record
from fedsigma.common.data.sources.official_splits import Row
from fedsigma.common.data.sources.published import images_folder, open_card, read_rows

__all__ = ["compare_with_card"]


def compare_with_card(chosen: DatasetCard, path: Path) -> list[str]:
    """Return the differences between a folder and its card; empty if there are none.

    Compares the sizes of the splits, the classes, the first path of the split file, and that each image
    exists and is not empty.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: expected that of {chosen.title}")
    try:
        rows = read_rows(chosen, path) if chosen.layout.kind in ("split", "lists") else []
        source = open_card(chosen, path)
    except DataError as error:
        return [str(error)]
    found = [*_sizes(chosen, source.records), *_classes(chosen, source.classes)]
    if rows:
        found += _first(chosen, rows)
    return [*found, *_files(images_folder(chosen, path), source.records)]


def _sizes(chosen: DatasetCard, records: Iterable[Record]) -> list[str]:
    counts = Counter(record.split for record in records)
    return [
        f"{split}: {counts[split]:,} images, the card says {wanted:,}"
        for split in SPLITS
        if counts[split] != (wanted := getattr(chosen.images, split))
    ]


def _classes(chosen: DatasetCard, names: Sequence[str]) -> list[str]:
    found = []
    if len(names) != chosen.class_count:
        found.append(f"classes: {len(names):,}, the card says {chosen.class_count:,}")
    if chosen.class_names:
        here, wanted = ({same_name(name): name for name in side} for side in (names, chosen.class_names))
        found += [
            f"class '{wanted[key]}': on the card, not in the split" for key in wanted if key not in here
        ]
        found += [f"class '{here[key]}': in the split, not on the card" for key in here if key not in wanted]
    return found


def _first(chosen: DatasetCard, rows: Sequence[Row]) -> list[str]:
    first = next((row.path.as_posix() for row in rows if row.split == "train"), "")
    if not chosen.first_path or first == chosen.first_path:
        return []
    return [f"first training path: '{first}', the card says '{chosen.first_path}'"]


def _files(root: Path, records: Iterable[Record]) -> list[str]:
    """Report missing and empty images, listing each folder once."""
    sizes: dict[str, dict[str, int]] = {}
    missing, empty = [], []
    for record in records:
        folder, _, name = record.key.rpartition("/")
        if folder not in sizes:
            sizes[folder] = _listed(root / folder)
        size = sizes[folder].get(name)
        if size is None:
            missing.append(record.key)
        elif not size:
            empty.append(record.key)
    return [_some(keys, what) for keys, what in ((missing, "not there"), (empty, "empty")) if keys]


def _listed(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _some(keys: Sequence[str], what: str) -> str:
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys):,} {'image is' if len(keys) == 1 else 'images are'} {what}: {shown}"
