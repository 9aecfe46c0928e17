"""Run the cells of a table: results are saved, and a failed cell is reported without stopping the others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.records import DataError
from fedsigma.common.data.sources.site_data import NoImages
from fedsigma.common.training.classifier import TrainingError
from fedsigma.common.utils.errors import InputError
from fedsigma.server.federation.rounds import NoModel
from fedsigma.server.federation.site_manager import TooFewSites
from fedsigma.server.paper.cell import Score, run_cell
from fedsigma.server.paper.results import ResultsDatabase, cell_key
from fedsigma.server.paper.sets import PublishedSet
from fedsigma.server.paper.study_builder import CellSettings, build_study
from fedsigma.server.paper.tables import Cell

__all__ = ["TableResults", "check_settings", "run_cells", "select_share"]

# Errors that concern one cell only.
_FAILURES = (DataError, NoImages, TrainingError, NoModel, TooFewSites)


@dataclass
class TableResults:
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


def check_settings(cells: Sequence[Cell], sets: Mapping[str, PublishedSet], settings: CellSettings) -> None:
    """Check that the settings are compatible in every cell, before any is trained.

    Raises:
        ConfigError: They are not.
    """
    for cell in cells:
        with suppress(*_FAILURES):  # an error of one cell is reported when it is reached
            build_study(cell, sets[cell.trained_on], settings)


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
    database: ResultsDatabase,
    settings: CellSettings,
    folder: Path,
    *,
    run: set[Cell],
) -> TableResults:
    """Run the cells that have no result yet, one after the other.

    Args:
        cells: All cells of the table.
        sets: Sets by name.
        database: Database of finished cells.
        settings: Settings of all cells.
        folder: Parent of the run folders of federated cells.
        run: Cells that this call may run; empty to run none.

    Returns:
        The results of all cells.
    """
    results = TableResults()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("reading", total=len(cells))
        for cell in cells:
            progress.update(bar, description=str(cell))
            scores: list[Score] | None = None
            try:
                trained_on = sets[cell.trained_on]
                study = build_study(cell, trained_on, settings)
                key = cell_key(cell, study, trained_on)
                results.studies[key] = study
                digests = {name: sets[name].digest for name in cell.evaluated_on}
                found = database.find(key, digests)
                evaluated = {score.evaluated_on for score in found}
                missing = [name for name in cell.evaluated_on if name not in evaluated]
                if missing and cell in run:
                    start = time.monotonic()
                    added, cost = run_cell(cell, study, sets, folder / key[:16], missing)
                    database.save(key, cell, study, added, cost, time.monotonic() - start, digests)
                    found, missing = [*found, *added], []
                scores = None if missing else found
            except _FAILURES as error:
                # Other shots and seeds of a set and a setting mostly fail for the same reason.
                reason = str(error).partition("\n")[0] or type(error).__name__
                results.failures.setdefault(f"{cell.trained_on}, {cell.row}", reason)
            results.cells.append((cell, scores))
            progress.advance(bar)
    return results
