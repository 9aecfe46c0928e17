"""The paper's tables, and the cells that each consists of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedsigma.common.config.schema import ConfigError

__all__ = ["CENTRAL", "TABLES", "ZERO_SHOT", "Cell", "PaperTable", "Setting", "list_cells", "parse_settings"]

ZERO_SHOT = "zero-shot"
"""The row of the model without training."""
MAX_SHOTS = 16
"""Images a class in all protocols but few-shot."""


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        title: Title of the table.
        protocol: Protocol, as dataset cards name it.
        domain: Domain of its sets.
        trained_on: The one set that all models are trained on; empty to train on each set.
        published: Averages over the sets in CLIP-SVD's README, in per cent by column.
    """

    title: str
    protocol: str
    domain: str
    trained_on: str = ""
    published: dict[str, float] | None = None


TABLES = {
    "fewshot-biomedical": PaperTable(
        "Few-shot, biomedical sets",
        "few_shot",
        "biomedical",
        published={"1": 56.35, "2": 62.63, "4": 68.02, "8": 73.26, "16": 76.46, "zero-shot": 42.38},
    ),
    "fewshot-natural": PaperTable(
        "Few-shot, natural sets",
        "few_shot",
        "natural",
        published={"1": 73.20, "2": 76.06, "4": 78.18, "8": 80.55, "16": 82.97, "zero-shot": 65.36},
    ),
    "base-to-novel-biomedical": PaperTable(
        "Base to novel classes, biomedical sets",
        "base_to_novel",
        "biomedical",
        published={"base": 82.64, "novel": 74.31, "harmonic mean": 78.25},
    ),
    "base-to-novel-natural": PaperTable(
        "Base to novel classes, natural sets",
        "base_to_novel",
        "natural",
        published={"base": 84.38, "novel": 76.29, "harmonic mean": 80.13},
    ),
    "cross-dataset": PaperTable("From one data set to others", "cross_dataset", "natural", "imagenet"),
    "domain-shift": PaperTable("Domain generalisation", "domain_generalization", "shift", "imagenet"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a model is trained.

    Attributes:
        division: `central`, or the division of the training images among sites: `iid`, `dirichlet`,
            `disjoint` (each class at one site) or `natural` (the set's own sites).
        alpha: Concentration of the Dirichlet distribution.
        sites: Number of sites; 0 for `natural`.
        participation: Share of the sites that train in a round.
        pooled: Train on the sites' images in one place, for the steps of all sites together.
    """

    division: str = "central"
    alpha: float = 0.0
    sites: int = 0
    participation: float = 1.0
    pooled: bool = False

    def __str__(self) -> str:
        if self.division == "central":
            return "central"
        # 12 digits, since two settings must not have the same name, and 0.07 must be shown as 7%.
        names = {"iid": "IID", "dirichlet": f"Dirichlet {self.alpha:.12g}"}
        text = names.get(self.division, self.division) + (f", {self.sites} sites" if self.sites else " sites")
        text += f", {100 * self.participation:.12g}% a round" if self.participation < 1 else ""
        return f"pooled: {text}" if self.pooled else text

    @property
    def sites_by(self) -> str | dict[str, Any]:
        """The same as `sites_by` of a study's data section."""
        if self.division == "natural":
            return "site"
        alpha = {"alpha": self.alpha} if self.division == "dirichlet" else {}
        return {self.division: {"sites": self.sites, **alpha}}


CENTRAL = Setting()


def parse_settings(
    names: Sequence[str], *, sites: Sequence[int], participation: Sequence[float], pooled: bool
) -> list[Setting]:
    """Return each combination of these values once.

    Args:
        names: `central`, `iid`, `dirichlet-ALPHA`, `disjoint` or `natural`.
        sites: Numbers of sites, for all but `central` and `natural`.
        participation: Shares of sites a round, for all but `central`.
        pooled: Whether to add the pooled training of each division.

    Raises:
        ConfigError: A name is unknown, or a number is out of range.
    """
    if invalid := [count for count in sites if not 2 <= count <= 10_000]:
        raise ConfigError(f"sites is {invalid[0]}, expected 2 to 10000")
    if out_of_range := [share for share in participation if not 0 < share <= 1]:
        raise ConfigError(f"participation is {out_of_range[0]:g}, expected a share above 0 and at most 1")
    settings: list[Setting] = []
    for division in (division for name in names for division in _parse_division(name, sites)):
        if division == CENTRAL:
            settings.append(division)
            continue
        for share in participation:
            for together in (False, True) if pooled else (False,):
                settings.append(replace(division, participation=share, pooled=together))
    return list(dict.fromkeys(settings))


def _parse_division(name: str, sites: Sequence[int]) -> list[Setting]:
    if name in ("central", "natural"):
        return [Setting(division=name)]
    if name in ("iid", "disjoint"):
        return [Setting(division=name, sites=count) for count in sites]
    alpha = re.fullmatch(r"dirichlet-([0-9]*\.?[0-9]+)", name)
    if alpha and float(alpha[1]) > 0:
        return [Setting(division="dirichlet", alpha=float(alpha[1]), sites=count) for count in sites]
    raise ConfigError(
        f"the setting '{name}' is unknown: expected central, iid, dirichlet-ALPHA (as dirichlet-0.1),"
        " disjoint or natural"
    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a table.

    Attributes:
        protocol: Protocol of the table.
        trained_on: Set that it is trained on.
        shots: Training images a class; 0 for the model without training.
        setting: Where it is trained; None for the model without training.
        seed: Seed of the images and the training.
        evaluated_on: Sets that it is evaluated on.
    """

    protocol: str
    trained_on: str
    shots: int
    setting: Setting | None
    seed: int
    evaluated_on: tuple[str, ...]

    @property
    def row(self) -> str:
        """Row of the table."""
        return ZERO_SHOT if self.setting is None else str(self.setting)

    @property
    def training_half(self) -> str | None:
        """Half of the classes to train on; None for all."""
        return "base" if self.protocol == "base_to_novel" else None

    def __str__(self) -> str:
        shots = f", {self.shots} shots, seed {self.seed}" if self.shots else ""
        return f"{self.trained_on}, {self.row}{shots}"


def list_cells(
    table: PaperTable,
    sets: Sequence[str],
    *,
    settings: Sequence[Setting],
    shots: Sequence[int],
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """Yield the cells of a table, seed by seed, so that the results of an interrupted call are comparable.

    Args:
        table: The table.
        sets: Names of the sets to evaluate on.
        settings: Settings of the rows.
        shots: Numbers of images a class, for the few-shot protocol.
        seeds: Seeds.
    """
    trained_on: dict[str, tuple[str, ...]] = {name: (name,) for name in sets}
    if table.trained_on and sets:
        trained_on = {table.trained_on: (table.trained_on, *sets)}
    cells = [
        partial(Cell, protocol=table.protocol, trained_on=name, evaluated_on=evaluated_on)
        for name, evaluated_on in trained_on.items()
    ]
    for cell in cells:
        yield cell(shots=0, setting=None, seed=0)
    for seed in seeds:
        for cell in cells:
            for number in shots if table.protocol == "few_shot" else (MAX_SHOTS,):
                for setting in settings:
                    yield cell(shots=number, setting=setting, seed=seed)
