"""Splits that do not divide groups, and the few labelled pictures of a study.

The order is given by digests of the seed and a name, so the result does not depend on the order of the
records, and a picture added later moves few others.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fedsigma.common.data.records import DataError, Record

__all__ = ["base_and_novel", "few_shot", "group_of", "in_turns", "safest_split", "split_groups"]


def group_of(record: Record) -> tuple[str, str]:
    """Return what must stay together: the record's group, or the picture alone."""
    return ("picture", record.key) if record.group is None else ("group", record.group)


def group_records(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Collect records by group, groups and their members in a fixed order."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.key):
        groups[group_of(record)].append(record)
    return dict(sorted(groups.items()))


def majority_label(members: Iterable[Record]) -> str:
    """Return the most frequent label of a group, the first by name among equals; '' for none."""
    counts = Counter(record.label or "" for record in members)
    return min(counts, key=lambda label: (-counts[label], label))


def safest_split(splits: Iterable[str | None]) -> str | None:
    """Return the split to keep of several, test before val before train: test data must not be trained on."""
    return next((split for split in ("test", "val", "train") if split in set(splits)), None)


def _rank(seed: int, *names: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()


def split_groups(records: Sequence[Record], *, test_share: float, seed: int) -> list[Record]:
    """Set the split of records that have none, without dividing a group.

    Within each site and class, groups go to 'test' until its share of the pictures is reached; of two groups
    or more, each side gets at least one. Open records of a group that has a split follow it.

    Args:
        records: The records; those with a split keep it.
        test_share: Share of 'test' in the pictures of each site and class, between 0 and 1.
        seed: Seed of the split.

    Returns:
        The records in their order, each with a split.

    Raises:
        DataError: test_share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise DataError(f"test_share is {test_share!r}, expected a number between 0 and 1, both excluded")
    split_of: dict[tuple[str, str], str] = {}
    strata: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    groups = group_records(records)
    for name, members in groups.items():
        if split := safest_split([record.split for record in members]):
            split_of[name] = split
        else:
            site = min(record.site or "" for record in members)
            strata[site, majority_label(members)].append(name)
    for names in strata.values():
        names.sort(key=lambda name: _rank(seed, "split", *name))
        target = test_share * sum(len(groups[name]) for name in names)
        test, pictures = [], 0
        for name in names:
            size = len(groups[name])
            if abs(pictures + size - target) <= abs(pictures - target):  # closer to the share with it
                test.append(name)
                pictures += size
        if len(names) > 1 and not test:
            test = names[:1]
        if len(test) == len(names):
            test = test[:-1]  # leave something to train on
        split_of.update(dict.fromkeys(names, "train") | dict.fromkeys(test, "test"))
    return [r if r.split else replace(r, split=split_of[group_of(r)]) for r in records]


def few_shot(
    records: Sequence[Record], *, shots: int, classes: Sequence[str], seed: int, split: str = "train"
) -> list[Record]:
    """Draw `shots` pictures of each class for training; fewer where a class has fewer.

    Pictures of different groups come first, so that few shots show many patients. The draw with fewer shots
    is part of the draw with more.

    Args:
        records: The records of one site.
        shots: Pictures of each class.
        classes: The classes to draw.
        seed: Seed of the draw.
        split: The split to draw from.

    Raises:
        DataError: shots is below 1.
    """
    if shots < 1:
        raise DataError(f"shots is {shots}, expected at least 1")
    pools: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        if record.split == split:
            pools[record.label].append(record)
    drawn: list[Record] = []
    for label in classes:
        pool = sorted(pools[label], key=lambda r: _rank(seed, "shot", r.key))
        drawn += in_turns(pool, group_of)[:shots]
    return drawn


def in_turns(records: Iterable[Record], key: Callable[[Record], object]) -> list[Record]:
    """Return the first record of each key, then the second of each, and so on."""
    counts: Counter[object] = Counter()
    turns = []
    for record in records:
        counts[key(record)] += 1
        turns.append((counts[key(record)], record))
    return [record for _, record in sorted(turns, key=lambda item: item[0])]


def base_and_novel(classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the base classes (the first half, rounded up) and the novel classes (the rest)."""
    middle = math.ceil(len(classes) / 2)
    return tuple(classes[:middle]), tuple(classes[middle:])
