"""Compares a folder with a data set card, without decoding pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from fedsigma.common.data.catalog.card import DatasetCard, same_name
from fedsigma.common.data.records import SPLITS, DataError, Record
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
    counts = Counter(record.split for record in source.records)
    differences = [
        f"{split}: {counts[split]:,} images, the card says {expected:,}"
        for split in SPLITS
        if counts[split] != (expected := getattr(chosen.images, split))
    ]
    differences += _classes(chosen, source.classes)
    first = next((row.path.as_posix() for row in rows if row.split == "train"), "")
    if rows and chosen.first_path and first != chosen.first_path:
        differences.append(f"first training path: '{first}', the card says '{chosen.first_path}'")
    return differences + _files(images_folder(chosen, path), source.records)


def _classes(chosen: DatasetCard, names: Sequence[str]) -> list[str]:
    differences = []
    if len(names) != chosen.class_count:
        differences.append(f"classes: {len(names):,}, the card says {chosen.class_count:,}")
    if chosen.class_names:
        split, card = ({same_name(name): name for name in side} for side in (names, chosen.class_names))
        differences += [f"class '{card[k]}': on the card, not in the split" for k in card if k not in split]
        differences += [f"class '{split[k]}': in the split, not on the card" for k in split if k not in card]
    return differences


def _files(root: Path, records: Iterable[Record]) -> list[str]:
    """Report missing and empty images, listing each folder once."""
    list_sizes = cache(_list_sizes)
    missing, empty = [], []
    for record in records:
        folder, _, name = record.key.rpartition("/")
        size = list_sizes(root / folder).get(name)
        if size is None:
            missing.append(record.key)
        elif not size:
            empty.append(record.key)
    return [
        f"{len(keys):,} {'image is' if len(keys) == 1 else 'images are'} {what}: {', '.join(keys[:3])}"
        + (", ..." if len(keys) > 3 else "")
        for keys, what in ((missing, "not there"), (empty, "empty"))
        if keys
    ]


def _list_sizes(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
