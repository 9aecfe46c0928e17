"""The paper's tables, and the cells that each is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsigma.common.config.schema import ConfigError

__all__ = [
    "CENTRAL",
    "SHOTS",
    "TABLES",
    "ZERO_SHOT",
    "Cell",
    "PaperTable",
    "Setting",
    "list_cells",
    "parse_settings",
]

SHOTS = (1, 2, 4, 8, 16)
"""The paper's numbers of labelled images a class."""
ZERO_SHOT = "zero-shot"
"""The row of the model without training."""
MOST_SHOTS = 16
"""Those of all protocols but few-shot."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table.

    Fields: title; protocol, as a card names it; domain of its sets; trained_on, the one set that training is
    on where it is one; published, what CLIP-SVD's README states for the average over the sets, in per cent,
    by column.
    """

    title: str
    protocol: str
    domain: str
    trained_on: str = ""
    published: dict[str, float] | None = None


TABLES = {
    "fewshot-biomedical": PaperTable(
        title="Few-shot, biomedical sets",
        protocol="few_shot",
        domain="biomedical",
        published={"1": 56.35, "2": 62.63, "4": 68.02, "8": 73.26, "16": 76.46, "zero-shot": 42.38},
    ),
    "fewshot-natural": PaperTable(
        title="Few-shot, natural sets",
        protocol="few_shot",
        domain="natural",
        published={"1": 73.20, "2": 76.06, "4": 78.18, "8": 80.55, "16": 82.97, "zero-shot": 65.36},
    ),
    "base-to-novel-biomedical": PaperTable(
        title="Base to novel classes, biomedical sets",
        protocol="base_to_novel",
        domain="biomedical",
        published={"base": 82.64, "novel": 74.31, "harmonic mean": 78.25},
    ),
    "base-to-novel-natural": PaperTable(
        title="Base to novel classes, natural sets",
        protocol="base_to_novel",
        domain="natural",
        published={"base": 84.38, "novel": 76.29, "harmonic mean": 80.13},
    ),
    "cross-dataset": PaperTable(
        title="From one data set to others", protocol="cross_dataset", domain="natural", trained_on="imagenet"
    ),
    "domain-shift": PaperTable(
        title="Domain generalisation",
        protocol="domain_generalization",
        domain="shift",
        trained_on="imagenet",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a model is trained.

    Fields: way, `central`, or how the training images are divided among sites: `iid`, `dirichlet`, `disjoint`
    (each class at one site), `natural` (the set's own sites); alpha, Dirichlet's; sites, their number (of
    `natural`: 0, the set says); participation, the share of the sites that is asked in a round; pooled: the
    sites' images in one place, for the steps that all sites make together at this participation.
    """

    way: str = "central"
    alpha: float = 0.0
    sites: int = 0
    participation: float = 1.0
    pooled: bool = False

    def __str__(self) -> str:
        if self.way == "central":
            return "central"
        # To twelve digits: two settings must not have one name, and 0.07 is to be 7%.
        way = {"iid": "IID", "dirichlet": f"Dirichlet {self.alpha:.12g}"}.get(self.way, self.way)
        told = f"{way}, {self.sites} sites" if self.sites else f"{way} sites"
        told += f", {100 * self.participation:.12g}% a round" if self.participation < 1 else ""
        return f"pooled: {told}" if self.pooled else told

    @property
    def sites_by(self) -> str | dict[str, Any]:
        """How a study's data section says it."""
        match self.way:
            case "natural":
                return "site"
            case "dirichlet":
                return {"dirichlet": {"sites": self.sites, "alpha": self.alpha}}
        return {self.way: {"sites": self.sites}}


CENTRAL = Setting()


def parse_settings(
    names: Sequence[str], *, sites: Sequence[int], participation: Sequence[float], pooled: bool
) -> list[Setting]:
    """Every setting that is asked for, each once.

    Args:
        names: `central`, `iid`, `dirichlet-ALPHA`, `disjoint` or `natural`.
        sites: Numbers of sites to try, for the settings that they concern.
        participation: Shares of sites a round to try, for federated settings.
        pooled: Whether each division is also trained in one place.

    Raises:
        ConfigError: A name is not one of these, or a number is out of range.
    """
    if bad := [count for count in sites if not 2 <= count <= 10_000]:
        raise ConfigError(f"sites is {bad[0]}, expected 2 to 10000")
    if wrong := [share for share in participation if not 0 < share <= 1]:
        raise ConfigError(f"participation is {wrong[0]:g}, expected a share above 0 and at most 1")
    found: list[Setting] = []
    for name in names:
        for one in _named(name, sites):
            for share in participation if one.way != "central" else (1.0,):
                found.append(replace(one, participation=share))
                if pooled and one.way != "central":
                    found.append(replace(one, participation=share, pooled=True))
    return list(dict.fromkeys(found))


def _named(name: str, sites: Sequence[int]) -> list[Setting]:
    if name == "central":
        return [CENTRAL]
    if name == "natural":
        return [Setting(way="natural")]
    if name in ("iid", "disjoint"):
        return [Setting(way=name, sites=count) for count in sites]
    alpha = re.fullmatch(r"dirichlet-([0-9]*\.?[0-9]+)", name)
    if alpha and float(alpha[1]) > 0:
        return [Setting(way="dirichlet", alpha=float(alpha[1]), sites=count) for count in sites]
    raise ConfigError(
        f"the setting '{name}' is not known: expected central, iid, dirichlet-ALPHA (as dirichlet-0.1),"
        " disjoint or natural"
    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to train, and what it is judged on.

    Fields: protocol; trained_on, the set; shots, 0 for the model without training; setting, None for that;
    seed; judged_on, the sets whose test images judge it.
    """

    protocol: str
    trained_on: str
    shots: int
    setting: Setting | None
    seed: int
    judged_on: tuple[str, ...]

    @property
    def row(self) -> str:
        """Its row in the table."""
        return ZERO_SHOT if self.setting is None else str(self.setting)

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
    """The cells of a table: seed by seed, so that an interrupted call has whole comparisons.

    Args:
        table: Which.
        sets: The names of its sets that are here; without the one that training is on, if it is one.
        settings: The settings of the rows.
        shots: Numbers of images a class, for the few-shot protocol.
        seeds: The seeds.
    """
    together = tuple(sets) if table.trained_on else ()
    groups = [(table.trained_on, (table.trained_on, *together))] if together else [(s, (s,)) for s in sets]
    for name, judged_on in groups:
        yield Cell(
            protocol=table.protocol, trained_on=name, shots=0, setting=None, seed=0, judged_on=judged_on
        )
    numbers = shots if table.protocol == "few_shot" else (MOST_SHOTS,)
    for seed in seeds:
        for name, judged_on in groups:
            for number in numbers:
                for setting in settings:
                    yield Cell(
                        protocol=table.protocol,
                        trained_on=name,
                        shots=number,
                        setting=setting,
                        seed=seed,
                        judged_on=judged_on,
                    )
