"""The series behind the charts of a run, in the form that the page's script draws.

Each series is a list by round, with null for missing values, so that the charts of fifty sites over two
hundred rounds take a few hundred kilobytes. Fractions are between 0 and 1, sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsigma.common.config.constants import ALL_SITES, METRICS
from fedsigma.common.utils.json_lines import Row
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["comparison_charts", "run_charts"]

CURVES = (*METRICS, "loss")
"""Columns of rounds.csv that are drawn for all sites and for each site."""
UPDATES = ("update_norm", "update_cosine", "shift_norm")
"""Columns of rounds.csv that compare the sites' updates."""
COLUMNS = (*CURVES, *UPDATES, "epsilon", "bytes_up", "bytes_down")
DIGITS = 4
_STATUS_CODES = {"accepted": "a", "late": "l", "rejected": "r", "failed": "f"}
_ABSENT = "."


def run_charts(run_dir: RunDir, study: dict[str, Any]) -> dict[str, Any]:
    """Return all series of one run with these settings of the study."""
    rows = run_dir.rounds()
    sites = list(dict.fromkeys(row["site"] for row in rows if row["site"] != ALL_SITES))
    table = _RoundsTable(rows, sites)
    epsilon = table.all_sites("epsilon")
    return {
        "rounds": table.rounds,
        "sites": sites,
        "metrics": {name: series for name in CURVES if (series := table.series(name))},
        "updates": {name: series for name in UPDATES if (series := table.series(name))},
        "participation": table.participation(),
        "bytes": {direction: table.sums(f"bytes_{direction}") for direction in ("up", "down")},
        "epsilon": epsilon,
        "epsilon_limit": (study.get("privacy") or {}).get("epsilon") if epsilon else None,
        "shift_magnitude": _shift_magnitude_chart(run_dir),
    }


def comparison_charts(run_dirs: Sequence[RunDir]) -> list[dict[str, Any]]:
    """Return the series over all sites of several runs, to be drawn in one chart."""
    charts = []
    for run_dir in run_dirs:
        table = _RoundsTable([row for row in run_dir.rounds() if row["site"] == ALL_SITES], [])
        metrics = {name: values for name in CURVES if (values := table.all_sites(name))}
        charts.append({"rounds": table.rounds, "metrics": metrics})
    return charts


def _shift_magnitude_chart(run_dir: RunDir) -> dict[str, Any]:
    """Return the mean absolute shift by round, tower, part and layer; empty before the first round ends."""
    lines = run_dir.shift_magnitudes()
    if not lines:
        return {}
    towers = {}
    for tower, newest in lines[-1]["towers"].items():
        by_round = [line["towers"].get(tower, {}).get("parts", {}) for line in lines]
        towers[tower] = {
            "layers": newest["layers"],
            "parts": list(newest["parts"]),
            "values": [[parts.get(part) for part in newest["parts"]] for parts in by_round],
        }
    return {"rounds": [line["round"] for line in lines], "towers": towers}


class _RoundsTable:
    """The rows of rounds.csv as one matrix per column, with a row per site and a last one for all sites."""

    def __init__(self, rows: list[Row], sites: list[str]) -> None:
        self.rounds = sorted({row["round"] for row in rows})
        column_of = {number: index for index, number in enumerate(self.rounds)}
        row_of = {site: index for index, site in enumerate((*sites, ALL_SITES))}
        shape = (len(row_of), len(self.rounds))
        self._matrices = {name: np.full(shape, np.nan) for name in COLUMNS if rows and name in rows[0]}
        self._codes = {site: [_ABSENT] * len(self.rounds) for site in row_of}
        for row in rows:
            site, column = row["site"], column_of[row["round"]]
            for name, matrix in self._matrices.items():
                if (value := row[name]) is not None:
                    matrix[row_of[site], column] = value
            self._codes[site][column] = _STATUS_CODES.get(row["status"], _ABSENT)

    def _rows(self, name: str) -> list[list[float | None]]:
        matrix = self._matrices.get(name)
        if matrix is None or np.isnan(matrix).all():
            return []
        # More digits than a chart can show.
        rows = np.round(matrix, DIGITS).tolist()
        return [[None if value != value else value for value in row] for row in rows]

    def series(self, name: str) -> dict[str, Any]:
        """Return one column for all sites and for each site; empty if it has no values."""
        rows = self._rows(name)
        return {"all_sites": rows[-1], "sites": rows[:-1]} if rows else {}

    def all_sites(self, name: str) -> list[float | None]:
        """Return one column for all sites; empty if it has no values."""
        rows = self._rows(name)
        return rows[-1] if rows else []

    def participation(self) -> dict[str, str]:
        """Return the status of each site, one letter per round."""
        return {site: "".join(codes) for site, codes in self._codes.items() if site != ALL_SITES}

    def sums(self, name: str) -> list[int]:
        """Return the sum of one column over all sites by round."""
        return [int(value) for value in np.nansum(self._matrices[name], axis=0)] if self.rounds else []
