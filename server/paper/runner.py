"""Working through a table's cells: what is done is kept, what fails is told, and the rest goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsigma.common.config.schema import flatten
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.records import DataError
from fedsigma.common.data.sources.site_data import NoImages
from fedsigma.common.training.classifier import TrainingError
from fedsigma.common.utils.errors import InputError
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.federation.site_manager import TooFewSites
from fedsigma.server.paper import NO_END, ROUNDS
from fedsigma.server.paper.cell import Score, run_cell
from fedsigma.server.paper.results import Results, key_of
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.study_builder import study_of
from fedsigma.server.paper.tables import Cell

__all__ = ["Outcome", "Recipe", "share_of", "work"]

# What is wrong with one cell, and not with the others.
_FAILURES = (DataError, NoImages, TrainingError, NoModel, TooFewSites)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all cells of a call have in common: see `study_of`."""

    backbone: str
    rounds: int
    most_steps: int
    overrides: Mapping[str, Any]

    def changed(self) -> list[str]:
        """What makes these cells others than the table's own, in words."""
        found = [f"{place} = {value}" for place, value in flatten(self.overrides)]
        if self.rounds != ROUNDS:
            found.append(f"at most {self.rounds:,} rounds")
        if self.most_steps != NO_END:
            found.append(f"at most {self.most_steps:,} steps a site")
        return found

    def check(self, cells: Sequence[Cell], sets: Mapping[str, PublishedSet]) -> None:
        """See that the settings go together in every cell, before any is trained.

        Raises:
            ConfigError: They do not.
        """
        for cell in cells:
            with suppress(*_FAILURES):  # what is wrong with one cell is told when it is reached
                self.study(cell, sets)

    def study(self, cell: Cell, sets: Mapping[str, PublishedSet]) -> StudyConfig:
        """The study of a cell."""
        return study_of(
            cell,
            sets[cell.trained_on],
            backbone=self.backbone,
            rounds=self.rounds,
            most_steps=self.most_steps,
            overrides=self.overrides,
        )


@dataclass
class Outcome:
    """The cells of a table with their scores, None where there are none, and why some failed."""

    cells: list[tuple[Cell, list[Score] | None]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    studies: dict[str, StudyConfig] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """How many cells have scores."""
        return sum(scores is not None for _, scores in self.cells)


def share_of(cells: Sequence[Cell], share: str) -> set[Cell]:
    """The cells of one of several machines: '2/4' is the second of four.

    Raises:
        ValueError: It is not of that form.
    """
    number, slash, count = share.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--share is '{share}', expected NUMBER/COUNT as 1/4")
    return set(cells[int(number) - 1 :: int(count)])


def work(
    cells: Sequence[Cell],
    sets: Mapping[str, PublishedSet],
    results: Results,
    recipe: Recipe,
    folder: Path,
    *,
    run: set[Cell],
) -> Outcome:
    """Run the cells that are missing, one by one, and return all.

    Args:
        cells: Of the table.
        sets: By name.
        results: Where finished ones are kept.
        recipe: Of all.
        folder: The run folders of federated cells are below it.
        run: Those that this call may run; empty to run none.
    """
    outcome = Outcome()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading", total=len(cells))
        for cell in cells:
            scores: list[Score] = []
            progress.update(bar, description=str(cell))
            try:
                study = recipe.study(cell, sets)
                key = key_of(cell, study, sets[cell.trained_on])
                outcome.studies[key] = study
                digests = {name: sets[name].digest for name in cell.judged_on}
                scores = results.find(key, digests)
                lacking = [name for name in cell.judged_on if name not in {one.judged_on for one in scores}]
                if lacking and cell in run:
                    done = run_cell(cell, study, sets, folder / key[:16], lacking)
                    results.keep(key, cell, study, done, digests)
                    scores, lacking = [*scores, *done.scores], []
            except _FAILURES as error:
                # Other shots and seeds of a set and a setting mostly fail for the same reason.
                reason = str(error).partition("\n")[0] or type(error).__name__
                outcome.failures.setdefault(f"{cell.trained_on}, {cell.row}", reason)
                lacking = list(cell.judged_on)
            outcome.cells.append((cell, None if lacking else scores))
            progress.advance(bar)
    return outcome
