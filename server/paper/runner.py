"""Run the cells of a table: results are saved, and a failed cell is reported without stopping the others."""

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
from fedsigma.server.paper.results import ResultsDatabase, cell_key
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.study_builder import build_study
from fedsigma.server.paper.tables import Cell

__all__ = ["CellSettings", "Outcome", "run_cells", "select_share"]

# Errors that concern one cell only.
_FAILURES = (DataError, NoImages, TrainingError, NoModel, TooFewSites)


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """Settings that all cells of a call share.

    Attributes:
        backbone: Backbone of the studies; empty for that of each set's card.
        rounds: Most rounds of a federated run.
        most_steps: Most optimiser steps of a site.
        overrides: Settings by section, from `read_overrides`.
    """

    backbone: str
    rounds: int
    most_steps: int
    overrides: Mapping[str, Any]

    def changed(self) -> list[str]:
        """Describe each difference from the table's own settings."""
        changes = [f"{name} = {value}" for name, value in flatten(self.overrides)]
        if self.rounds != ROUNDS:
            changes.append(f"at most {self.rounds:,} rounds")
        if self.most_steps != NO_END:
            changes.append(f"at most {self.most_steps:,} steps a site")
        return changes

    def check(self, cells: Sequence[Cell], sets: Mapping[str, PublishedSet]) -> None:
        """Check that the settings are compatible in every cell, before any is trained.

        Raises:
            ConfigError: They are not.
        """
        for cell in cells:
            with suppress(*_FAILURES):  # an error of one cell is reported when it is reached
                self.study(cell, sets)

    def study(self, cell: Cell, sets: Mapping[str, PublishedSet]) -> StudyConfig:
        """Return the study of a cell."""
        return build_study(
            cell,
            sets[cell.trained_on],
            backbone=self.backbone,
            rounds=self.rounds,
            most_steps=self.most_steps,
            overrides=self.overrides,
        )


@dataclass
class Outcome:
    """Results of a table.

    Attributes:
        cells: Each cell with its scores; None if it has none.
        failures: Reasons by name of the cells that failed.
        studies: Studies by key of the cell.
    """

    cells: list[tuple[Cell, list[Score] | None]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    studies: dict[str, StudyConfig] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Number of cells that have scores."""
        return sum(scores is not None for _, scores in self.cells)


def select_share(cells: Sequence[Cell], share: str) -> set[Cell]:
    """Return the cells of one of several machines: '2/4' is the second of four.

    Raises:
        InputError: It is not of this form.
    """
    number, slash, count = share.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise InputError(f"--share is '{share}', expected NUMBER/COUNT as 1/4")
    return set(cells[int(number) - 1 :: int(count)])


def run_cells(
    cells: Sequence[Cell],
    sets: Mapping[str, PublishedSet],
    results: ResultsDatabase,
    recipe: CellSettings,
    folder: Path,
    *,
    run: set[Cell],
) -> Outcome:
    """Run the cells that have no result yet, one after the other.

    Args:
        cells: All cells of the table.
        sets: Sets by name.
        results: Database of finished cells.
        recipe: Settings of all cells.
        folder: Parent of the run folders of federated cells.
        run: Cells that this call may run; empty to run none.

    Returns:
        The results of all cells.
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
                key = cell_key(cell, study, sets[cell.trained_on])
                outcome.studies[key] = study
                digests = {name: sets[name].digest for name in cell.judged_on}
                scores = results.find(key, digests)
                missing = [name for name in cell.judged_on if name not in {one.judged_on for one in scores}]
                if missing and cell in run:
                    done = run_cell(cell, study, sets, folder / key[:16], missing)
                    results.save(key, cell, study, done, digests)
                    scores, missing = [*scores, *done.scores], []
            except _FAILURES as error:
                # Other shots and seeds of a set and a setting mostly fail for the same reason.
                reason = str(error).partition("\n")[0] or type(error).__name__
                outcome.failures.setdefault(f"{cell.trained_on}, {cell.row}", reason)
                missing = list(cell.judged_on)
            outcome.cells.append((cell, None if missing else scores))
            progress.advance(bar)
    return outcome
