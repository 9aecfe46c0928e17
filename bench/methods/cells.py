"""The cells of the comparison (a method, a setting, a study and a seed) and the database that keeps them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.methods.catalogue import CANDIDATES, Candidate, Setting, with_setting
from bench.methods.federation import accuracy, federate, study_sites
from bench.methods.studies import find_study
from bench.tune import validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config import StudyConfig
from fedsigma.common.training import Example, TrainingError

__all__ = ["MOST_RATES", "Cell", "Cells", "Plan", "grid"]

Sites = Mapping[str, tuple[list[Example], list[Example]]]
SEARCH_SEED = 11
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

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a cell, or None before it was run."""
        with closing(self._open()) as database:
            row = database.execute("SELECT figures FROM cells WHERE cell = ?", (cell.key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, cell: Cell, figures: Mapping[str, Any]) -> None:
        """Write the figures of a cell."""
        with closing(self._open()) as database, database:
            database.execute("INSERT OR REPLACE INTO cells VALUES (?, ?)", (cell.key, json.dumps(figures)))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)


class Plan:
    """Runs the cells that are missing, and tells those that are there.

    Args:
        cells: where they are kept.
        rounds, search_rounds: of a run on the test part and of one of the search; what is quick is searched
            with the former.
        search_study: where all that is not quick is searched, for every study; by default each for itself.
        run_missing: False: what is missing is None.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        rounds: int,
        search_rounds: int,
        search_study: str | None = None,
        run_missing: bool = True,
    ) -> None:
        self._cells, self._rounds, self._search_rounds = cells, rounds, search_rounds
        self._search_study = search_study
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
                        return None
                    found[key] = setting, figures["accuracy"]["all"]
            best = _best(list(found.values())).get("learning_rate")
            if not rates or len(rates) >= MOST_RATES or best not in (rates[0], rates[-1]):
                return list(found.values())
            rates = further(rates, best)

    def _trial(self, study: str, method: str, setting: Setting) -> Cell:
        quick = CANDIDATES[method].quick
        return Cell(
            part="validation",
            study=study if quick else self._search_study or study,
            method=method,
            setting=setting,
            rounds=self._rounds if quick else self._search_rounds,
            seed=SEARCH_SEED,
        )

    def _figures(self, cell: Cell) -> dict[str, Any] | None:
        found = self._cells.find(cell)
        if found is None and self._run_missing:
            try:
                found = self._run(cell)
            except TrainingError:
                if cell.part == "test":
                    raise
                found = {"accuracy": {"all": 0.0}, "seconds": 0.0}
            self._cells.keep(cell, found)
            print(
                f"{cell.part} {cell.study} {cell.method} {cell.setting} seed {cell.seed}: "
                f"{found['accuracy']['all']:.3f} in {found['seconds']:.0f} s",
                flush=True,
            )
        return found

    def _run(self, cell: Cell) -> dict[str, Any]:
        started, candidate = time.monotonic(), CANDIDATES[cell.method]
        base = find_study(cell.study)
        base = replace(base, seed=cell.seed, federation=replace(base.federation, rounds=cell.rounds))
        study = with_setting(base, candidate, cell.setting)
        backbone = load_backbone(study.backbone)
        sites = self._images(cell, study, backbone.image_size * 3 // 2)
        method = candidate.build(backbone, study, cell.setting)
        run = federate(method, {name: train for name, (train, _) in sites.items()}, study)
        held = {name: images for name, (_, images) in sites.items()}
        return {
            "accuracy": accuracy(method, run.state, held),
            "bytes_upload": run.upload,
            "bytes_float32": method.bytes_up(run.state),
            "bytes_total": run.total,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _images(self, cell: Cell, study: StudyConfig, side: int) -> Sites:
        key = (cell.study, cell.seed, cell.part)
        if key not in self._sites:
            if len(self._sites) > 2:
                self._sites.clear()  # those of a study's search and of a seed or two are enough to hold
            if cell.part == "validation":
                self._sites[key] = validation_sites(study, side, VALIDATION, study.seed)
            else:
                found = study_sites(study, side)
                self._sites[key] = {name: (data.train, data.test) for name, data in found.items()}
        return self._sites[key]


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
