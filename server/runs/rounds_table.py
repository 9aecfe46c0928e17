"""`rounds.csv`: one row for each site and round, with a column for each metric."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedsigma.common.config.constants import METRICS
from fedsigma.common.utils.files import write_atomic
from fedsigma.common.utils.json_lines import AppendLog, Row

__all__ = ["METRIC_COLUMNS", "RoundsTable", "latest", "parse_row", "split_cells"]

METRIC_COLUMNS = (
    *(*METRICS, "loss", "examples", "test_examples", "epsilon"),
    *("update_norm", "update_cosine", "shift_norm"),
)
"""The metric columns that every `rounds.csv` has; a run may add more, to the right of these."""

_FIXED = ("round", "site", "status", "bytes_up", "bytes_down", "reason")
_WHOLE = {"round", "bytes_up", "bytes_down", "examples", "test_examples"}
_TEXT = {"site", "status", "reason"}
_METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


class RoundsTable(AppendLog[Row]):
    """The table of a run's rounds.

    A torn last row never counts: unlike a JSON object it cannot be distinguished from a whole one, as 12 may
    be the beginning of 128.
    """

    _columns: list[str] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row; a metric that the file does not have yet becomes a new column.

        Raises:
            ValueError: A metric's name cannot be that of a column.
        """
        for name in row:
            if name not in _FIXED and not _METRIC_NAME.fullmatch(name):
                raise ValueError(
                    f"metric {name!r} of site {row['site']!r} cannot be a column of rounds.csv: expected at "
                    "most 64 letters, digits and _ . -, beginning with a letter"
                )
        columns = self._add_columns(row)
        self.append_line(_join_cells([_to_cell(row.get(name)) for name in columns]))

    def parser(self) -> Callable[[str, int], Row | None]:
        """See `AppendLog.parser`; the first line that is not blank is the header."""
        header: list[str] = []

        def parse(line: str, number: int) -> Row | None:
            if not line.strip():
                return None
            cells = split_cells(line)
            if not header:
                header.extend(cells)
                return None
            return parse_row(header, cells)

        return parse

    def _add_columns(self, row: Mapping[str, Any]) -> list[str]:
        """Return the file's columns, after adding those that this row needs."""
        self.repair()
        if self._columns is None or not self.path.is_file():
            self._columns = next(iter(self._cells()), None)
        columns = self._columns or [*_FIXED[:-1], *METRIC_COLUMNS, _FIXED[-1]]
        columns = [*columns, *(name for name in row if name not in columns)]
        if columns != self._columns:
            # The table is rewritten with the new columns.
            lines = [columns, *([*cells, *[""] * (len(columns) - len(cells))] for cells in self._cells()[1:])]
            write_atomic(self.path, "".join(_join_cells(cells) + "\n" for cells in lines).encode("utf-8"))
            self._columns = columns
        return columns

    def _cells(self) -> list[list[str]]:
        text = self.path.read_bytes().decode("utf-8", "replace") if self.path.is_file() else ""
        return [split_cells(line) for line in text.split("\n") if line.strip()]


def latest(records: Iterable[Row], *keys: str) -> list[Row]:
    """Sort records by round; of several of one round with the same values of `keys`, the last counts."""
    by_key = {tuple(record[key] for key in ("round", *keys)): record for record in records}
    return sorted(by_key.values(), key=lambda record: record["round"])


def parse_row(header: list[str], cells: list[str]) -> Row | None:
    """Parse the cells of one row, with its numbers as numbers; None if it is damaged."""
    if len(cells) != len(header):
        return None
    row: Row = dict.fromkeys(header)
    try:
        for name, text in zip(header, cells, strict=True):
            if name in _TEXT:
                row[name] = text
            elif text:
                number = float(text)
                if math.isfinite(number):
                    row[name] = int(number) if name in _WHOLE else number
    except ValueError:
        return None
    return row if all(row.get(name) is not None for name in _FIXED) else None


def split_cells(line: str) -> list[str]:
    """Split one line of CSV into its cells; empty if the line is damaged."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a field longer than any that is written here
        return []


def _join_cells(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(cells)
    return buffer.getvalue()


def _to_cell(value: Any) -> str:
    """The text of a value; empty for None and for a number that is not finite."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _CONTROL.sub(" ", value)  # one row stays one line
    number = float(value)
    if not math.isfinite(number):
        return ""
    return str(int(number)) if number.is_integer() else repr(number)
