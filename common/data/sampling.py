"""Splits that keep groups whole, and the few labelled pictures of a study.

Order comes from digests of the seed and a name, not from a generator: the result does not depend on the order
of the records, and adding a picture later moves few others.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedsigma.common.data.records import DataError, Record

__all__ = ["base_and_novel", "few_shot", "group_of", "split_groups"]


def group_of(record: Record) -> tuple[str, str]:
    """Name of what must stay together: the record's group, or the picture alone."""
    # The first part keeps a group from being taken for a picture of the same name.
    return ("picture", record.key) if record.group is None else ("group", record.group)


def group_records(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Collect records by group, groups and their members in a fixed order."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.key):
        groups[group_of(record)].append(record)
    return dict(sorted(groups.items()))


def majority_label(members: Iterable[Record]) -> str:
    """Most frequent label of a group, the first by name among equals; '' for none."""
    counts = Counter(record.label or "" for record in members)
    return min(counts, key=lambda label: (-counts[label], label))


def _rank(seed: int, *names: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()


def split_groups(records: Sequence[Record], *, test_share: float, seed: int) -> list[Record]:
    """Fill in the split of records that have none, never dividing a group.

    Within each site and class, groups go to 'test' until its share of the pictures is reached; where there
    are two groups or more, each side gets at least one. Open records of a group that has a split follow it.

    Args:
        records: any records; those with a split keep it.
        test_share: share of the pictures of each site and class wanted in 'test', between 0 and 1.
        seed: the same seed gives the same split, whatever the order of the records.

    Returns:
        The records in their order, each with a split.

    Raises:
        DataError: test_share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise DataError(f"test_share is {test_share!r}, expected a number between 0 and 1, both left out")
    chosen: dict[tuple[str, str], str] = {}
    strata: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    groups = group_records(records)
    for name, members in groups.items():
        given = {record.split for record in members} - {None}
        if given:
            # The check reports a group given to both sides; its open records go where they do least harm.
            chosen[name] = next(s for s in ("test", "val", "train") if s in given)
        else:
            site = min(record.site or "" for record in members)
            strata[site, majority_label(members)].append(name)
    for names in strata.values():
        names.sort(key=lambda name: _rank(seed, "split", *name))
        wanted = test_share * sum(len(groups[name]) for name in names)
        test, taken = [], 0
        for name in names:
            size = len(groups[name])
            if abs(taken + size - wanted) <= abs(taken - wanted):  # nearer to the share with it than without
                test.append(name)
                taken += size
        if len(names) > 1 and not test:
            test = names[:1]
        if len(test) == len(names):
            test = test[:-1]  # something must be left to train on
        chosen.update(dict.fromkeys(names, "train") | dict.fromkeys(test, "test"))
    return [r if r.split else replace(r, split=chosen[group_of(r)]) for r in records]


def few_shot(
    records: Sequence[Record], *, shots: int, classes: Sequence[str], seed: int, split: str = "train"
) -> list[Record]:
    """Draw `shots` pictures of each class for training; fewer where a class has fewer.

    Pictures of different groups come first, so that few shots show many patients. The draw with fewer shots
    is part of the draw with more.

    Args:
        records: the records of one site.
        shots: pictures of each class.
        classes: classes to draw; other labels are left out.
        seed: the same seed gives the same draw, whatever the order of the records.
        split: the part to draw from.

    Raises:
        DataError: shots is below 1.
    """
    if shots < 1:
        raise DataError(f"shots is {shots}, expected at least 1")
    drawn: list[Record] = []
    pools: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        if record.split == split:
            pools[record.label].append(record)
    for label in classes:
        pool = list(pools[label])
        pool.sort(key=lambda r: _rank(seed, "shot", r.key))
        seen: Counter[tuple[str, str]] = Counter()
        turns = []
        for record in pool:
            turns.append(seen[group_of(record)])
            seen[group_of(record)] += 1
        order = sorted(range(len(pool)), key=lambda i: (turns[i], i))
        drawn += [pool[i] for i in order[:shots]]
    return drawn


def base_and_novel(classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The base and the novel classes of the field's protocol: the first half, rounded up, and the rest."""
    middle = math.ceil(len(classes) / 2)
    return tuple(classes[:middle]), tuple(classes[middle:])
