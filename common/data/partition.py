"""Dividing one data set among simulated sites, by flwr-datasets' partitioners."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsigma.common.data.records import DataError, Record
from fedsigma.common.data.sampling import group_of, group_records, majority_label

__all__ = ["partition"]

# For each way: its settings, which of them must be given, and the partitioner they make.
_Maker = Callable[[Any, dict[str, Any], int], Any]
_WAYS: dict[str, tuple[dict[str, Any], _Maker]] = {
    "iid": ({"sites": None}, lambda p, s, seed: p.IidPartitioner(num_partitions=s["sites"])),
    "dirichlet": (
        {"sites": None, "alpha": None, "min_groups": 1},
        lambda p, s, seed: p.DirichletPartitioner(
            num_partitions=s["sites"],
            partition_by="label",
            alpha=s["alpha"],
            min_partition_size=s["min_groups"],
            self_balancing=False,
            seed=seed,
        ),
    ),
    "pathological": (
        {"sites": None, "classes_per_site": None},
        lambda p, s, seed: p.PathologicalPartitioner(
            num_partitions=s["sites"],
            partition_by="label",
            num_classes_per_partition=s["classes_per_site"],
            class_assignment_mode="first-deterministic",
            seed=seed,
        ),
    ),
    "disjoint": ({"sites": None}, lambda _, s, seed: _ClassDealer(s["sites"], seed)),
}


def partition(
    records: Sequence[Record], sites_by: str | Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, list[Record]]:
    """Divide records among sites; every record goes to exactly one.

    Made-up sites divide groups, not pictures, so that no patient is at two sites; a group counts by its most
    frequent label.

    Args:
        records: any records.
        sites_by: 'site' (the records' own sites), {'iid': {'sites': 4}}, {'dirichlet': {'sites': 10,
            'alpha': 0.1}} (`min_groups`, the fewest groups of a site, default 1: if ten draws each leave a
            site with fewer, the richest of the first draw give it what it lacks), {'pathological':
            {'sites': 4, 'classes_per_site': 2}}, or {'disjoint': {'sites': 4}}: each class is at one site.
        seed: the same seed gives the same sites, whatever the order of the records.

    Returns:
        The records of each site, by name; `record.site` is that name.

    Raises:
        DataError: the way or a setting is not known, a record has no site, flwr-datasets is not installed, or
            the records cannot be divided so.
    """
    if sites_by in ("site", {"site": {}}):
        return _by_own_site(records)
    if not isinstance(sites_by, Mapping) or len(sites_by) != 1:
        raise DataError(
            f"sites_by is {sites_by!r}, expected 'site' or one of {', '.join(_WAYS)} with settings"
        )
    ((way, settings),) = sites_by.items()
    if way not in _WAYS:
        raise DataError(f"sites_by names {way!r}: known are site, {', '.join(_WAYS)}")
    return _divide(records, way, _settings(way, settings), seed)


def _by_own_site(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Divide by the records' own sites: what flwr-datasets' NaturalIdPartitioner gives, without its import.

    Importing flwr-datasets takes seconds in each process of a simulation, and this way needs nothing from it.
    """
    homeless = [record for record in records if record.site is None]
    if homeless:
        raise DataError(
            f"sites_by is 'site', and {len(homeless)} of {len(records)} records have no site: add a column "
            "'site' (of a set with a split file: sites.csv in its folder), or divide by another way"
        )
    names = sorted({record.site for record in records if record.site})
    return {name: [record for record in records if record.site == name] for name in names}


def _settings(way: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    known = _WAYS[way][0]
    given = given if isinstance(given, Mapping) else {}
    settings = {**known, **given}
    for name, value in settings.items():
        if name not in known:
            raise DataError(f"sites_by {way} has no setting {name!r}: known are {', '.join(known)}")
        if value is None:
            raise DataError(f"sites_by {way} needs {name!r}: write {{{way}: {{{_example(way)}}}}}")
        whole = name != "alpha"
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            wanted = "a whole number of at least 1" if whole else "a number above 0"
            raise DataError(f"sites_by {way} has {name} {value!r}, expected {wanted}")
    return settings


def _example(way: str) -> str:
    shown = {"alpha": 0.5, "sites": 4, "classes_per_site": 2}
    return ", ".join(f"{name}: {shown[name]}" for name, value in _WAYS[way][0].items() if value is None)


def _divide(
    records: Sequence[Record], way: str, settings: dict[str, Any], seed: int
) -> dict[str, list[Record]]:
    groups = group_records(records)
    count = settings["sites"]
    if count > len(groups):
        raise DataError(f"sites_by {way} wants {count} sites, and the data have only {len(groups)} groups")
    names = [f"site-{number + 1:0{len(str(count))}d}" for number in range(count)]
    placed: dict[tuple[str, str], str] = {}
    keys = list(groups)
    for name, rows in zip(names, _rows(groups, way, settings, seed), strict=True):
        placed.update({keys[row]: name for row in rows})
    lost = {majority_label(groups[key]) or "no label" for key in keys if key not in placed}
    if lost:
        raise DataError(
            f"sites_by {way} leaves {', '.join(sorted(lost))} at no site: raise sites to the number of "
            f"classes, or classes_per_site (now {settings.get('classes_per_site')})"
        )
    return {
        name: [
            replace(record, site=name)
            for record in sorted(records, key=lambda r: r.key)
            if placed[group_of(record)] == name
        ]
        for name in names
    }


class _ClassDealer:
    """Deals whole classes to sites in turn, in an order drawn by the seed: a partitioner of our own.

    Those of flwr-datasets give a site a number of classes, and share some where it does not divide them all.
    """

    dataset: Any

    def __init__(self, sites: int, seed: int) -> None:
        self._sites, self._seed = sites, seed

    def load_partition(self, number: int) -> Any:
        """The rows of one site.

        Raises:
            ValueError: there are fewer classes than sites.
        """
        labels = list(self.dataset["label"])
        classes = sorted(set(labels))
        if len(classes) < self._sites:
            raise ValueError(f"they have only {len(classes)} classes for {self._sites} sites")
        random.Random(self._seed).shuffle(classes)
        own = set(classes[number :: self._sites])
        return self.dataset.select([row for row, label in enumerate(labels) if label in own])


def _rows(
    groups: Mapping[tuple[str, str], list[Record]], way: str, settings: dict[str, Any], seed: int
) -> list[list[int]]:
    """Have flwr-datasets divide one row per group; returns the rows of each site."""
    try:
        from datasets import Dataset
        from flwr_datasets import partitioner as partitioners
    except ImportError as error:
        raise DataError(f"sites_by {way} needs flwr-datasets: pip install fedsigma[simulation]") from error
    table = Dataset.from_dict(
        {"row": list(range(len(groups))), "label": [majority_label(members) for members in groups.values()]}
    ).shuffle(seed=seed)  # IidPartitioner takes rows as they come

    def divided(settings: dict[str, Any]) -> list[list[int]]:
        divider = _WAYS[way][1](partitioners, settings, seed)
        divider.dataset = table
        return [list(divider.load_partition(number)["row"]) for number in range(settings["sites"])]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a retry or an unused class: judged above by the outcome
        try:
            return divided(settings)
        except ValueError as error:
            least = settings.get("min_groups", 0)
            if way != "dirichlet" or least * settings["sites"] > len(groups):
                raise DataError(f"sites_by {way} cannot divide {len(groups)} groups: {error}") from error
        return _levelled(divided(settings | {"min_groups": 0}), least)


def _levelled(sites: list[list[int]], least: int) -> list[list[int]]:
    """Have the site with the most rows give its last one to one with fewer than `least`, until none has."""
    for poor in sites:
        while len(poor) < least:
            poor.append(max(sites, key=len).pop())
    return sites
