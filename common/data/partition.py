"""Divides a data set among simulated sites with the partitioners of flwr-datasets."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsigma.common.data.records import DataError, Record
from fedsigma.common.data.sampling import group_of, group_records, majority_label

__all__ = ["partition"]

# For each scheme: its settings (None: required) and a function that builds the partitioner.
_SCHEMES: dict[str, tuple[dict[str, Any], Callable[[Any, dict[str, Any], int], Any]]] = {
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
    "disjoint": ({"sites": None}, lambda _, s, seed: _DisjointPartitioner(s["sites"], seed)),
}
_EXAMPLES = {"alpha": 0.5, "sites": 4, "classes_per_site": 2}


def partition(
    records: Sequence[Record], sites_by: str | Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, list[Record]]:
    """Divide records among sites; every record goes to exactly one.

    Simulated sites divide groups, not pictures, so that no patient is at two sites; a group has the most
    frequent label of its pictures.

    Args:
        records: The records.
        sites_by: 'site' (the records' own sites), {'iid': {'sites': 4}}, {'dirichlet': {'sites': 10,
            'alpha': 0.1}} (`min_groups`, the smallest number of groups of a site, default 1: if ten draws
            each leave a site with fewer, the largest sites of the first draw give it groups),
            {'pathological': {'sites': 4, 'classes_per_site': 2}}, or {'disjoint': {'sites': 4}}: each class
            is at one site.
        seed: Seed of the division.

    Returns:
        The records of each site, by name; `record.site` is this name.

    Raises:
        DataError: The scheme or a setting is unknown, a record has no site, flwr-datasets is not installed,
            or
            the records cannot be divided in this way.
    """
    if sites_by in ("site", {"site": {}}):
        return _by_record_site(records)
    if not isinstance(sites_by, Mapping) or len(sites_by) != 1:
        raise DataError(
            f"sites_by is {sites_by!r}, expected 'site' or one of {', '.join(_SCHEMES)} with settings"
        )
    ((scheme, settings),) = sites_by.items()
    if scheme not in _SCHEMES:
        raise DataError(f"sites_by names {scheme!r}: known are site, {', '.join(_SCHEMES)}")
    return _divide(records, scheme, _check_settings(scheme, settings), seed)


def _by_record_site(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Divide by the records' own sites, without flwr-datasets, whose import takes seconds in each process."""
    if missing := sum(record.site is None for record in records):
        raise DataError(
            f"sites_by is 'site', and {missing} of {len(records)} records have no site: add a column "
            "'site' (of a set with a split file: sites.csv in its folder), or use another sites_by"
        )
    names = sorted({record.site for record in records if record.site})
    return {name: [record for record in records if record.site == name] for name in names}


def _check_settings(scheme: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    defaults = _SCHEMES[scheme][0]
    settings = {**defaults, **(values if isinstance(values, Mapping) else {})}
    for name, value in settings.items():
        if name not in defaults:
            raise DataError(f"sites_by {scheme} has no setting {name!r}: known are {', '.join(defaults)}")
        if value is None:
            example = ", ".join(
                f"{key}: {_EXAMPLES[key]}" for key, default in defaults.items() if default is None
            )
            raise DataError(f"sites_by {scheme} needs {name!r}: write {{{scheme}: {{{example}}}}}")
        kind: Any = int
        expected = "a whole number of at least 1"
        if name == "alpha":
            kind, expected = int | float, "a number above 0"
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise DataError(f"sites_by {scheme} has {name} {value!r}, expected {expected}")
    return settings


def _divide(
    records: Sequence[Record], scheme: str, settings: dict[str, Any], seed: int
) -> dict[str, list[Record]]:
    groups = group_records(records)
    count = settings["sites"]
    if count > len(groups):
        raise DataError(
            f"sites_by {scheme} needs at least {count} groups for its sites, the data have only {len(groups)}"
        )
    keys = list(groups)
    site_of: dict[tuple[str, str], str] = {}
    sites: dict[str, list[Record]] = {}
    for number, rows in enumerate(_partition_rows(groups, scheme, settings, seed), 1):
        name = f"site-{number:0{len(str(count))}d}"
        sites[name] = []
        site_of.update({keys[row]: name for row in rows})
    if missing := {majority_label(groups[key]) or "no label" for key in keys if key not in site_of}:
        raise DataError(
            f"sites_by {scheme} leaves {', '.join(sorted(missing))} at no site: raise sites to the number of "
            f"classes, or classes_per_site (now {settings.get('classes_per_site')})"
        )
    for record in sorted(records, key=lambda r: r.key):
        name = site_of[group_of(record)]
        sites[name].append(replace(record, site=name))
    return sites


class _DisjointPartitioner:
    """Deals classes to sites in turn, in an order drawn by the seed.

    The partitioners of flwr-datasets let sites share classes where their number is not divisible.
    """

    dataset: Any

    def __init__(self, sites: int, seed: int) -> None:
        self._sites, self._seed = sites, seed

    def load_partition(self, number: int) -> Any:
        labels = list(self.dataset["label"])
        classes = sorted(set(labels))
        if len(classes) < self._sites:
            raise ValueError(f"they have only {len(classes)} classes for {self._sites} sites")
        random.Random(self._seed).shuffle(classes)
        selected = set(classes[number :: self._sites])
        return self.dataset.select([row for row, label in enumerate(labels) if label in selected])


def _partition_rows(
    groups: Mapping[tuple[str, str], list[Record]], scheme: str, settings: dict[str, Any], seed: int
) -> list[list[int]]:
    """Partition a table of one row a group; returns the rows of each site."""
    try:
        from datasets import Dataset
        from flwr_datasets import partitioner as partitioners
    except ImportError as error:
        raise DataError(f"sites_by {scheme} needs flwr-datasets: pip install fedsigma[simulation]") from error
    table = Dataset.from_dict(
        {"row": list(range(len(groups))), "label": [majority_label(members) for members in groups.values()]}
    ).shuffle(seed=seed)  # IidPartitioner does not shuffle

    def run(settings: dict[str, Any]) -> list[list[int]]:
        partitioner = _SCHEMES[scheme][1](partitioners, settings, seed)
        partitioner.dataset = table
        return [list(partitioner.load_partition(number)["row"]) for number in range(settings["sites"])]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about retries and unused classes; the result is checked instead
        try:
            return run(settings)
        except ValueError as error:
            minimum = settings.get("min_groups", 0)
            if scheme != "dirichlet" or minimum * settings["sites"] > len(groups):
                raise DataError(f"sites_by {scheme} cannot divide {len(groups)} groups: {error}") from error
        sites = run(settings | {"min_groups": 0})
    for rows in sites:
        while len(rows) < minimum:
            rows.append(max(sites, key=len).pop())
    return sites
