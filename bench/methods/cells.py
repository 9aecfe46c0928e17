"""The cells of the comparison (a method, a setting, a study and a seed), and the plan that runs them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cell_store import CellStore, recipe_digest
from bench.methods.catalogue import CANDIDATES, Candidate, Setting, with_setting
from bench.methods.federation import accuracy, federate
from bench.methods.studies import find_study
from bench.tune import Sites, validation_sites
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.sources.site_data import load_sites
from fedsigma.common.training.classifier import Example, TrainingError

Trial = tuple[Setting, float | None]
"""A setting and its accuracy on validation images; None if it is the only one."""
SEARCH_SEED, FIRST_SEED = 11, 1
"""Quick methods are searched with a seed of their own. Methods that train towers are searched by their runs
with the first seed, whose models are evaluated on validation images as well."""
VALIDATION = 40
"""Validation images of a class and site at most."""
MAX_RATES = 5
"""Learning rates that a search tries at most."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        part: Images to evaluate on: `validation` (left over by the few-shot draw) or `test`.
        study: Name of the study.
        method: Name of the method.
        setting: Its setting.
        rounds: Rounds of the run.
        seed: Seed of the study.
    """

    part: str
    study: str
    method: str
    setting: Setting
    rounds: int
    seed: int

    @property
    def key(self) -> str:
        """See `Keyed`."""
        return json.dumps(vars(self), sort_keys=True)


class Plan:
    """Runs the missing cells, and returns the figures of all.

    Args:
        store: Where cells are kept.
        rounds: Rounds of every run.
        search_study: Where learning rates are searched for all studies; by default in each.
        max_rates: Learning rates that are tried at most, except of quick methods.
        run_missing: False: missing cells are None.
    """

    def __init__(
        self,
        store: CellStore,
        *,
        rounds: int,
        search_study: str | None = None,
        max_rates: int = MAX_RATES,
        run_missing: bool = True,
    ) -> None:
        self._store, self._rounds = store, rounds
        self._search_study, self._max_rates = search_study, max_rates
        self._run_missing = run_missing
        self._sites: dict[tuple[str, int, str], Sites] = {}

    def tested(self, study: str, method: str, seed: int) -> dict[str, Any] | None:
        """Return the figures of a method on the test part, with the setting that its search has chosen."""
        trials = self.search(study, method)
        if trials is None:
            return None
        setting = _best(trials)
        cell = Cell(part="test", study=study, method=method, setting=setting, rounds=self._rounds, seed=seed)
        return self._figures(cell)

    def search(self, study: str, method: str) -> list[Trial] | None:
        """Return the settings tried; None if some are missing.

        The grid of learning rates is extended beyond an end that is best. A single setting is not tried. One
        whose training diverges has accuracy zero.
        """
        candidate, base = CANDIDATES[method], Setting()
        if candidate.after:
            before = self.search(study, candidate.after)
            if before is None:
                return None
            base = _best(before)
        rates, trials = list(candidate.rates), dict[str, Trial]()
        while True:
            settings = list(grid(candidate, base, rates))
            if len(settings) == 1:
                return [(settings[0], None)]
            for setting in settings:
                key = json.dumps(setting, sort_keys=True)
                if key not in trials:
                    figures = self._figures(self._trial(study, method, setting))
                    if figures is None:
                        # Nothing is run: of a search that was stopped early, return the finished part.
                        return list(trials.values()) if len(rates) > len(candidate.rates) else None
                    trials[key] = setting, figures["accuracy"]["all"]
            best = _best(list(trials.values())).get("learning_rate")
            limit = MAX_RATES if candidate.quick else self._max_rates
            if not rates or len(rates) >= limit or best not in (rates[0], rates[-1]):
                return list(trials.values())
            rates = _extend(rates, best)

    def _trial(self, study: str, method: str, setting: Setting) -> Cell:
        candidate = CANDIDATES[method]
        return Cell(
            part="validation",
            study=study if candidate.search_everywhere else self._search_study or study,
            method=method,
            setting=setting,
            rounds=self._rounds,
            seed=SEARCH_SEED if candidate.quick else FIRST_SEED,
        )

    def _figures(self, cell: Cell) -> dict[str, Any] | None:
        study = self._study(cell)
        recipe = recipe_digest(study)
        figures = self._store.find(cell, recipe)
        if figures is None and self._run_missing:
            try:
                by_part = self._run(cell, study)
            except TrainingError:
                if cell.part == "test":
                    raise
                by_part = {cell.part: {"accuracy": {"all": 0.0}, "seconds": 0.0}}
            for part, figures in by_part.items():
                self._store.save(replace(cell, part=part), figures, recipe)
                print(
                    f"{part} {cell.study} {cell.method} {cell.setting} seed {cell.seed}: "
                    f"{figures['accuracy']['all']:.3f} in {figures['seconds']:.0f} s",
                    flush=True,
                )
            figures = by_part[cell.part]
        return figures

    def _study(self, cell: Cell) -> StudyConfig:
        base = find_study(cell.study)
        base = replace(base, seed=cell.seed, federation=replace(base.federation, rounds=cell.rounds))
        return with_setting(base, CANDIDATES[cell.method], cell.setting)

    def _run(self, cell: Cell, study: StudyConfig) -> dict[str, dict[str, Any]]:
        """Return figures by part: of the cell's part, and of both for methods whose training takes long."""
        started, candidate = time.monotonic(), CANDIDATES[cell.method]
        backbone = load_backbone(study.backbone)
        side = backbone.image_size * 3 // 2
        parts = (cell.part,) if candidate.quick else ("validation", "test")
        loaded = {part: self._images(replace(cell, part=part), study, side) for part in parts}
        images = {
            part: sites for part, sites in loaded.items() if any(held_out for _, held_out in sites.values())
        }
        if cell.part not in images:
            raise SystemExit(f"{cell.study} has no {cell.part} images: {cell.method} cannot be evaluated")
        training = [{name: train for name, (train, _) in sites.items()} for sites in images.values()]
        if not all(_equal_images(training[0], other) for other in training[1:]):
            raise RuntimeError(f"{cell.study}: the draws for validation and test have other training images")
        method = candidate.build(backbone, study, cell.setting)
        run = federate(method, training[0], study)
        cost = {
            "bytes_upload": run.upload,
            "bytes_float32": method.bytes_up(run.state),
            "bytes_total": run.total,
            "seconds": round(time.monotonic() - started, 1),
        }
        return {
            part: {
                "accuracy": accuracy(method, run.state, {n: held_out for n, (_, held_out) in sites.items()}),
                **cost,
            }
            for part, sites in images.items()
        }

    def _images(self, cell: Cell, study: StudyConfig, side: int) -> Sites:
        key = (cell.study, cell.seed, cell.part)
        if key not in self._sites:
            if len(self._sites) > 2:
                self._sites.clear()  # keeps those of a study's search and of a seed or two
            if cell.part == "validation":
                self._sites[key] = validation_sites(study, side, VALIDATION)
            else:
                data = load_sites(study, side=side)
                self._sites[key] = {name: (site.train, site.test) for name, site in data.items()}
        return self._sites[key]


def _equal_images(first: Mapping[str, Sequence[Example]], second: Mapping[str, Sequence[Example]]) -> bool:
    """Return whether sites have the same images in the same order, so that one model serves both."""
    return first.keys() == second.keys() and all(
        len(first[name]) == len(second[name])
        and all(
            a.label == b.label and torch.equal(a.image, b.image)
            for a, b in zip(first[name], second[name], strict=True)
        )
        for name in first
    )


def grid(candidate: Candidate, base: Setting, rates: list[float]) -> Iterator[Setting]:
    """Yield every rate with every other setting, added to the base."""
    for rate in rates or [None]:
        for other in candidate.others:
            yield base | ({} if rate is None else {"learning_rate": rate}) | other


def _extend(rates: list[float], best: float) -> list[float]:
    """Return the rates with one more beyond the end that is best, in the same ratio, to three digits."""
    if best == rates[0]:
        return [float(f"{rates[0] ** 2 / rates[1]:.3g}"), *rates]
    return [*rates, float(f"{rates[-1] ** 2 / rates[-2]:.3g}")]


def _best(trials: list[Trial]) -> Setting:
    return max(trials, key=lambda trial: trial[1] or 0.0)[0]
