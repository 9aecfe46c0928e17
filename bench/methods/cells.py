"""The cells of the comparison (a method, a setting, a study and a seed) and the database that keeps them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.methods.catalogue import CANDIDATES, Candidate, Setting, with_setting
from bench.methods.federation import accuracy, federate, study_sites
from bench.methods.studies import find_study
from bench.tune import validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.training.classifier import Example, TrainingError, supports_bfloat16

__all__ = ["MOST_RATES", "Cell", "Cells", "Plan", "grid", "recipe_of"]

Sites = Mapping[str, tuple[list[Example], list[Example]]]
SEARCH_SEED, FIRST_SEED = 11, 1
"""What is quick is searched with a seed of its own. What trains towers is searched by its runs with the first
seed themselves, whose models are judged on validation images too."""
VALIDATION = 40
"""Validation images a class and site at most."""
MOST_RATES = 5
"""Learning rates that a search tries at most."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. part: `validation` images of the training part, or the `test` part."""

    part: str
    study: str
    method: str
    setting: Setting
    rounds: int
    seed: int

    @property
    def key(self) -> str:
        """The same for the same cell, on any machine."""
        return json.dumps(vars(self), sort_keys=True)


class Keyed(Protocol):
    """What figures are kept for."""

    @property
    def key(self) -> str: ...


def recipe_of(*studies: StudyConfig) -> str:
    """A digest of all that studies say, but their names and seeds and where their images lie."""
    said = hashlib.sha256()
    for study in studies:
        said.update(replace(study, name="any", seed=0, data=None, baselines=()).to_yaml().encode())
        said.update(json.dumps(study.data and study.data.sites_by, sort_keys=True).encode())
    return said.hexdigest()[:16]


class Cells:
    """The cells that were run, in one SQLite file; a cell is written when it is done.

    Args:
        path: of the file, made if it is not there. Several processes may write to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS cells (cell TEXT PRIMARY KEY, figures TEXT NOT NULL)"
            )

    def find(self, cell: Keyed, recipe: str) -> dict[str, Any] | None:
        """The figures of a cell; None before it was run with this recipe.

        Of cells that were kept without their recipe it is taken that it was this one.
        """
        with closing(self._open()) as database:
            row = database.execute("SELECT figures FROM cells WHERE cell = ?", (cell.key,)).fetchone()
        found = {} if row is None else json.loads(row[0])
        return found if found and found.get("recipe", recipe) == recipe else None

    def keep(self, cell: Keyed, figures: Mapping[str, Any], recipe: str) -> None:
        """Write the figures of a cell, with what they were computed in."""
        native = supports_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        told = {**figures, "recipe": recipe, "precision": "bfloat16" if native else "float32"}
        with closing(self._open()) as database, database:
            database.execute("INSERT OR REPLACE INTO cells VALUES (?, ?)", (cell.key, json.dumps(told)))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)


class Plan:
    """Runs the cells that are missing, and tells those that are there.

    Args:
        cells: where they are kept.
        rounds: of every run.
        search_study: where learning rates are searched for every study; by default each for itself.
        most_rates: how many learning rates are tried at most of what is not quick.
        run_missing: False: what is missing is None.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        rounds: int,
        search_study: str | None = None,
        most_rates: int = MOST_RATES,
        run_missing: bool = True,
    ) -> None:
        self._cells, self._rounds = cells, rounds
        self._search_study, self._most_rates = search_study, most_rates
        self._run_missing = run_missing
        self._sites: dict[tuple[str, int, str], Sites] = {}

    def tested(self, study: str, method: str, seed: int) -> dict[str, Any] | None:
        """The figures of a method on the test part, under the setting that its search has chosen."""
        tried = self.search(study, method)
        if tried is None:
            return None
        setting = _best(tried)
        cell = Cell(part="test", study=study, method=method, setting=setting, rounds=self._rounds, seed=seed)
        return self._figures(cell)

    def search(self, study: str, method: str) -> list[tuple[Setting, float | None]] | None:
        """The settings tried, with their accuracies on validation images; None if some are missing.

        The grid of learning rates goes on past an end that is best. A single setting is taken untried, and
        has no accuracy. One under which training diverges has accuracy zero.
        """
        candidate, base = CANDIDATES[method], Setting()
        if candidate.after:
            before = self.search(study, candidate.after)
            if before is None:
                return None
            base = _best(before)
        rates, found = list(candidate.rates), dict[str, tuple[Setting, float | None]]()
        while True:
            settings = list(grid(candidate, base, rates))
            if len(settings) == 1:
                return [(settings[0], None)]
            for setting in settings:
                key = json.dumps(setting, sort_keys=True)
                if key not in found:
                    figures = self._figures(self._trial(study, method, setting))
                    if figures is None:
                        # Without running anything: a search that was stopped early is told as far as it went.
                        return list(found.values()) if len(rates) > len(candidate.rates) else None
                    found[key] = setting, figures["accuracy"]["all"]
            best = _best(list(found.values())).get("learning_rate")
            most = MOST_RATES if candidate.quick else self._most_rates
            if not rates or len(rates) >= most or best not in (rates[0], rates[-1]):
                return list(found.values())
            rates = further(rates, best)

    def _trial(self, study: str, method: str, setting: Setting) -> Cell:
        quick, anew = CANDIDATES[method].quick, CANDIDATES[method].anew
        return Cell(
            part="validation",
            study=study if anew else self._search_study or study,
            method=method,
            setting=setting,
            rounds=self._rounds,
            seed=SEARCH_SEED if quick else FIRST_SEED,
        )

    def _figures(self, cell: Cell) -> dict[str, Any] | None:
        study = self._study(cell)
        recipe = recipe_of(study)
        found = self._cells.find(cell, recipe)
        if found is None and self._run_missing:
            try:
                judged = self._run(cell, study)
            except TrainingError:
                if cell.part == "test":
                    raise
                judged = {cell.part: {"accuracy": {"all": 0.0}, "seconds": 0.0}}
            for part, figures in judged.items():
                self._cells.keep(replace(cell, part=part), figures, recipe)
                print(
                    f"{part} {cell.study} {cell.method} {cell.setting} seed {cell.seed}: "
                    f"{figures['accuracy']['all']:.3f} in {figures['seconds']:.0f} s",
                    flush=True,
                )
            found = judged[cell.part]
        return found

    def _study(self, cell: Cell) -> StudyConfig:
        base = find_study(cell.study)
        base = replace(base, seed=cell.seed, federation=replace(base.federation, rounds=cell.rounds))
        return with_setting(base, CANDIDATES[cell.method], cell.setting)

    def _run(self, cell: Cell, study: StudyConfig) -> dict[str, dict[str, Any]]:
        """Figures by part: of the one that is asked for, and of both if training is the dear part of it."""
        started, candidate = time.monotonic(), CANDIDATES[cell.method]
        backbone = load_backbone(study.backbone)
        side = backbone.image_size * 3 // 2
        parts = (cell.part,) if candidate.quick else ("validation", "test")
        found = {part: self._images(replace(cell, part=part), study, side) for part in parts}
        images = {part: sites for part, sites in found.items() if any(held for _, held in sites.values())}
        if cell.part not in images:
            raise SystemExit(
                f"{cell.study}: no {cell.part} image is left, so {cell.method} cannot be searched on it"
            )
        training = [{name: train for name, (train, _) in sites.items()} for sites in images.values()]
        if not all(_alike(training[0], other) for other in training[1:]):
            raise RuntimeError(f"{cell.study}: the draws for validation and test have other training images")
        method = candidate.build(backbone, study, cell.setting)
        run = federate(method, training[0], study)
        sent = {
            "bytes_upload": run.upload,
            "bytes_float32": method.bytes_up(run.state),
            "bytes_total": run.total,
            "seconds": round(time.monotonic() - started, 1),
        }
        return {
            part: {
                "accuracy": accuracy(method, run.state, {n: held for n, (_, held) in sites.items()}),
                **sent,
            }
            for part, sites in images.items()
        }

    def _images(self, cell: Cell, study: StudyConfig, side: int) -> Sites:
        key = (cell.study, cell.seed, cell.part)
        if key not in self._sites:
            if len(self._sites) > 2:
                self._sites.clear()  # those of a study's search and of a seed or two are enough to hold
            if cell.part == "validation":
                self._sites[key] = validation_sites(study, side, VALIDATION)
            else:
                found = study_sites(study, side)
                self._sites[key] = {name: (data.train, data.test) for name, data in found.items()}
        return self._sites[key]


def _alike(one: Mapping[str, Sequence[Example]], other: Mapping[str, Sequence[Example]]) -> bool:
    """Whether sites have the same images in the same order, and so one model serves both."""
    return one.keys() == other.keys() and all(
        len(one[name]) == len(other[name])
        and all(
            a.label == b.label and torch.equal(a.image, b.image)
            for a, b in zip(one[name], other[name], strict=True)
        )
        for name in one
    )


def grid(candidate: Candidate, base: Setting, rates: list[float]) -> Iterator[Setting]:
    """Every rate with every other setting, on top of what is taken over."""
    for rate in rates or [None]:
        for other in candidate.others:
            yield base | ({} if rate is None else {"learning_rate": rate}) | other


def further(rates: list[float], best: float) -> list[float]:
    """One more rate beyond the end that is best, in the same ratio and rounded to three digits."""
    if best == rates[0]:
        return [float(f"{rates[0] ** 2 / rates[1]:.3g}"), *rates]
    return [*rates, float(f"{rates[-1] ** 2 / rates[-2]:.3g}")]


def _best(tried: list[tuple[Setting, float | None]]) -> Setting:
    return max(tried, key=lambda one: one[1] or 0.0)[0]
