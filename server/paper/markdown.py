"""The printed form of a table: rows are settings, accuracies in per cent with mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedsigma.server.paper.cell import Score
from fedsigma.server.paper.tables import ZERO_SHOT, Cell, PaperTable

__all__ = ["AVERAGE", "Value", "build_blocks", "flatten_blocks", "render_markdown"]

AVERAGE = "average"
NO_VALUE = "–"
HARMONIC = "harmonic mean"


@dataclass(frozen=True, kw_only=True)
class Value:
    """Accuracies of one entry.

    Attributes:
        seeds: Accuracy of each seed that has one, 0 to 1.
        expected: Number of seeds.
        mean_of: Base and novel values whose means' harmonic mean is the mean; None for the seeds' mean.
    """

    seeds: tuple[float, ...]
    expected: int
    mean_of: tuple[Value, Value] | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        if self.mean_of is not None:
            return _harmonic_mean(self.mean_of[0].mean, self.mean_of[1].mean)
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in the denominator); None for one seed."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    def __str__(self) -> str:
        if not self.seeds:
            return NO_VALUE
        text = f"{100 * self.mean:.1f}"
        text += "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return text if len(self.seeds) == self.expected else f"{text} ({len(self.seeds)} of {self.expected})"


Block = dict[str, dict[str, Value]]
"""Row -> column -> value."""
Accuracies = dict[str, dict[str, dict[int, float | None]]]
"""Row -> column -> seed -> accuracy; None if it is missing."""


def build_blocks(
    table: PaperTable,
    cells: Iterable[tuple[Cell, list[Score] | None]],
    names: Sequence[str],
    averaged: Sequence[str],
) -> dict[str, Block]:
    """Return a table's blocks: the average over sets first, if there are several, then each set.

    Args:
        table: The table.
        cells: All cells of the table, each with its scores, or None if it has none.
        names: Names of the sets in order. A table that trains on one set has one block with a column a set.
        averaged: Names of the sets in the average.

    Returns:
        Title of the block -> row -> column -> value. An average has the seeds that all sets have.
    """
    sets: dict[str, Accuracies] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for cell, scores in cells:
        for column, accuracy in _accuracies(table, cell, scores or ()):
            sets[cell.trained_on][cell.row][column][cell.seed] = accuracy
    if table.protocol == "few_shot":
        _repeat_zero_shot(sets.values())
    if table.trained_on:
        _add_mean_of_targets(table, sets[table.trained_on])
        return {table.title: _to_block(sets[table.trained_on])}
    blocks = {name: _to_block(sets[name]) for name in names}
    if len(averaged) > 1:
        blocks = {AVERAGE: _to_block(_average([sets[name] for name in averaged]))} | blocks
    return blocks


def _accuracies(table: PaperTable, cell: Cell, scores: Sequence[Score]) -> Iterator[tuple[str, float | None]]:
    """Yield the column and accuracy of each entry of a cell."""
    if table.protocol == "few_shot":
        yield str(cell.shots), scores[0].scores["accuracy"] if scores else None
        return
    halves = table.protocol == "base_to_novel"
    by_column = {s.half if halves else s.evaluated_on: s.scores["accuracy"] for s in scores}
    for column in ("base", "novel") if halves else cell.evaluated_on:
        yield column, by_column.get(column)


def _repeat_zero_shot(sets: Iterable[Accuracies]) -> None:
    """Repeat the accuracy without training in each column, as is usual in few-shot tables."""
    for rows in sets:
        columns = dict.fromkeys(c for row, values in rows.items() if row != ZERO_SHOT for c in values)
        if columns and ZERO_SHOT in rows:
            (value,) = rows[ZERO_SHOT].values()
            rows[ZERO_SHOT] = dict.fromkeys(columns, value)


def _to_block(rows: Accuracies) -> Block:
    """Return the values, with the harmonic mean of base and novel classes (Xian et al. 2017)."""
    block: Block = {}
    for row, columns in rows.items():
        block[row] = values = {
            column: Value(seeds=tuple(v for v in seeds.values() if v is not None), expected=len(seeds))
            for column, seeds in columns.items()
        }
        if {"base", "novel"} <= set(values):
            base, novel = values["base"], values["novel"]
            seeds = tuple(map(_harmonic_mean, base.seeds, novel.seeds))
            values[HARMONIC] = Value(seeds=seeds, expected=base.expected, mean_of=(base, novel))
    return block


def _harmonic_mean(base: float, novel: float) -> float:
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def _average(sets: Sequence[Accuracies]) -> Accuracies:
    """Return the averages over sets, seed by seed; None where one is missing."""
    averages: Accuracies = {}
    for row in dict.fromkeys(row for rows in sets for row in rows):
        averages[row] = {}
        for column in dict.fromkeys(column for rows in sets for column in rows.get(row, {})):
            by_set = [rows.get(row, {}).get(column, {}) for rows in sets]
            averages[row][column] = _average_seeds(
                by_set, dict.fromkeys(s for seeds in by_set for s in seeds)
            )
    return averages


def _average_seeds(
    by_set: Sequence[dict[int, float | None]], seeds: Iterable[int]
) -> dict[int, float | None]:
    averages: dict[int, float | None] = {}
    for seed in seeds:
        values = [by_seed.get(seed) for by_seed in by_set]
        present = [value for value in values if value is not None]
        averages[seed] = statistics.fmean(present) if present and len(present) == len(values) else None
    return averages


def _add_mean_of_targets(table: PaperTable, rows: Accuracies) -> None:
    """Add the column `average` over the sets that models were not trained on."""
    for columns in rows.values():
        targets = [by_seed for name, by_seed in columns.items() if name != table.trained_on]
        if len(targets) > 1:
            columns[AVERAGE] = _average_seeds(targets, targets[0])


def render_markdown(table: PaperTable, blocks: dict[str, Block], *, notes: Sequence[str] = ()) -> str:
    """Return the table as Markdown, with the notes at its end."""
    lines = [f"## {table.title}", ""]
    for name, block in blocks.items():
        columns = list(dict.fromkeys(column for values in block.values() for column in values))
        lines += [f"### {name}", ""] if len(blocks) > 1 else []
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row, values in block.items():
            lines.append(f"| {row} | " + " | ".join(str(values.get(c, NO_VALUE)) for c in columns) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def flatten_blocks(blocks: dict[str, Block]) -> list[dict[str, Any]]:
    """Return one dictionary an entry, for CSV and JSON."""
    return [
        {
            "block": block,
            "row": row,
            "column": column,
            "mean": value.mean if value.seeds else None,
            "spread": value.spread,
            "seeds": list(value.seeds),
            "expected": value.expected,
        }
        for block, rows in blocks.items()
        for row, columns in rows.items()
        for column, value in columns.items()
    ]
