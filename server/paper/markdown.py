"""The paper's form of a table: rows are settings, accuracies in per cent with mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedsigma.server.paper.cell import Score
from fedsigma.server.paper.tables import ZERO_SHOT, Cell, PaperTable

__all__ = ["AVERAGE", "Value", "build_blocks", "flatten_blocks", "render_markdown"]

AVERAGE = "average"
NOTHING = "–"
HARMONIC = "harmonic mean"

Block = dict[str, dict[str, "Value"]]
"""Row -> column -> value."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """Accuracies of one entry, as shares of 1, one a seed. wanted: how many there are to be."""

    seeds: tuple[float, ...]
    wanted: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in the denominator), None for one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    def __str__(self) -> str:
        if not self.seeds:
            return NOTHING
        told = f"{100 * self.mean:.1f}"
        told += "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return told if len(self.seeds) == self.wanted else f"{told} ({len(self.seeds)} of {self.wanted})"


def build_blocks(
    table: PaperTable,
    cells: Iterable[tuple[Cell, list[Score] | None]],
    names: Sequence[str],
    averaged: Sequence[str],
) -> dict[str, Block]:
    """A table's blocks: the average over sets first where there is more than one, then each set.

    Args:
        table: Which.
        cells: All of the table, each with its scores, or None if it is not done.
        names: The sets in order. A table that trains on one set has one block, with a column for each set.
        averaged: Those of them that the average is over.

    Returns:
        Title of the block -> row -> column -> value. An average is over the sets that have all their seeds'
        values, seed by seed; it is left empty while one is missing, for it would not be comparable.
    """
    found: dict[str, dict[str, dict[str, dict[int, float | None]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for cell, scores in cells:
        for block, column, value in _entries(table, cell, scores):
            found[block][cell.row][column][cell.seed] = value
    if table.protocol == "few_shot":
        _repeat_zero_shot(found.values())
    if table.trained_on:
        _add_mean_of_targets(table, found[table.trained_on])
        return {table.title: _values(found[table.trained_on])}
    blocks = {name: _values(found[name]) for name in names}
    if len(averaged) > 1:
        blocks = {AVERAGE: _values(_average([found[name] for name in averaged]))} | blocks
    return {name: _with_harmonic_mean(block) for name, block in blocks.items()}


def _entries(
    table: PaperTable, cell: Cell, scores: list[Score] | None
) -> Iterable[tuple[str, str, float | None]]:
    """Block, column and accuracy of everything that a cell tells."""
    if table.protocol == "few_shot":
        value = scores[0].scores["accuracy"] if scores else None
        yield cell.trained_on, str(cell.shots), value
    elif table.protocol == "base_to_novel":
        by_half = {one.half: one.scores["accuracy"] for one in scores or ()}
        for half in ("base", "novel"):
            yield cell.trained_on, half, by_half.get(half)
    else:
        by_set = {one.judged_on: one.scores["accuracy"] for one in scores or ()}
        for name in cell.judged_on:
            yield cell.trained_on, name, by_set.get(name)


Found = dict[str, dict[str, dict[int, float | None]]]


def _repeat_zero_shot(blocks: Iterable[Found]) -> None:
    """Put the accuracy without training under every number of shots, as the field's tables do."""
    for rows in blocks:
        columns = dict.fromkeys(c for row, values in rows.items() if row != ZERO_SHOT for c in values)
        if columns and ZERO_SHOT in rows:
            (value,) = rows[ZERO_SHOT].values()
            rows[ZERO_SHOT] = dict.fromkeys(columns, value)


def _values(found: Found) -> Block:
    return {
        row: {
            column: Value(seeds=tuple(v for v in by_seed.values() if v is not None), wanted=len(by_seed))
            for column, by_seed in columns.items()
        }
        for row, columns in found.items()
    }


def _average(sets: Sequence[Found]) -> Found:
    """Over sets, seed by seed; None where one is missing."""
    rows = list(dict.fromkeys(row for one in sets for row in one))
    result: Found = {}
    for row in rows:
        columns = list(dict.fromkeys(column for one in sets for column in one.get(row, {})))
        result[row] = {}
        for column in columns:
            by_seed = [one.get(row, {}).get(column, {}) for one in sets]
            seeds = list(dict.fromkeys(seed for values in by_seed for seed in values))
            result[row][column] = {seed: _mean([v.get(seed) for v in by_seed]) for seed in seeds}
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _add_mean_of_targets(table: PaperTable, found: Found) -> None:
    """The column `average`: over the sets that were not trained on, as the field's tables have it."""
    for columns in found.values():
        targets = [by_seed for name, by_seed in columns.items() if name != table.trained_on]
        if len(targets) > 1:
            columns[AVERAGE] = {seed: _mean([one.get(seed) for one in targets]) for seed in targets[0]}


def _with_harmonic_mean(block: Block) -> Block:
    """Add 2bn / (b + n) of the mean accuracies on base and novel classes b and n, as the field reckons it.

    Xian et al. 2017; of averages over sets, it is the harmonic mean of the averages.
    """
    for columns in block.values():
        if {"base", "novel"} <= set(columns):
            base, novel = columns["base"], columns["novel"]
            pairs = list(zip(base.seeds, novel.seeds, strict=False))
            per_seed = [2 * b * n / (b + n) if b + n else 0.0 for b, n in pairs]
            columns[HARMONIC] = _Harmonic(seeds=tuple(per_seed), wanted=base.wanted, of=(base, novel))
    return block


@dataclass(frozen=True, kw_only=True)
class _Harmonic(Value):
    """Its mean is that of the means; its spread that of the seeds' own."""

    of: tuple[Value, Value]

    @property
    def mean(self) -> float:
        base, novel = (one.mean for one in self.of)
        return 2 * base * novel / (base + novel) if base + novel else 0.0


def render_markdown(table: PaperTable, blocks: dict[str, Block], *, notes: Sequence[str] = ()) -> str:
    """The whole table as text, notes at its end."""
    lines = [f"## {table.title}", ""]
    for name, block in blocks.items():
        columns = list(dict.fromkeys(column for values in block.values() for column in values))
        lines += [f"### {name}", ""] if len(blocks) > 1 else []
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row, values in block.items():
            lines.append(f"| {row} | " + " | ".join(str(values.get(c, NOTHING)) for c in columns) + " |")
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"


def flatten_blocks(blocks: dict[str, Block]) -> list[dict[str, object]]:
    """One line an entry, for CSV and JSON: block, row, column, mean, spread, seeds, how many were wanted."""
    return [
        {
            "block": block,
            "row": row,
            "column": column,
            "mean": value.mean if value.seeds else None,
            "spread": value.spread,
            "seeds": list(value.seeds),
            "wanted": value.wanted,
        }
        for block, rows in blocks.items()
        for row, columns in rows.items()
        for column, value in columns.items()
    ]
