"""The numbers behind the charts of one run, in the shape that the page's script draws.

Series are lists by round with null where nothing was told, so that fifty sites over two hundred rounds stay
a few hundred kilobytes. Shares lie between 0 and 1, bytes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsigma.common.config.constants import METRICS
from fedsigma.server.runs.append_log import Row
from fedsigma.server.runs.rounds_table import ALL_SITES
from fedsigma.server.runs.run_dir import RunDir

__all__ = ["charts", "comparison"]

SHARED = (*METRICS, "loss")
"""What is drawn for the pooled model and for each site."""
DRIFT = ("update_norm", "update_cosine", "shift_norm")
FIGURES = (*SHARED, *DRIFT, "epsilon", "bytes_up", "bytes_down")
DIGITS = 4
_CODES = {"accepted": "a", "late": "l", "rejected": "r", "failed": "f"}
ABSENT = "."


def charts(folder: RunDir, study: dict[str, Any]) -> dict[str, Any]:
    """All series of one run."""
    rows = folder.rounds()
    sites = list(dict.fromkeys(row["site"] for row in rows if row["site"] != ALL_SITES))
    table = _Table(rows, sites)
    epsilon = table.pooled("epsilon")
    return {
        "rounds": table.rounds,
        "sites": sites,
        "metrics": {name: told for name in SHARED if (told := table.series(name))},
        "drift": {name: told for name in DRIFT if (told := table.series(name))},
        "part": dict(zip(sites, table.parts(), strict=True)),
        "bytes": {way: table.sums(f"bytes_{way}") for way in ("up", "down")},
        "epsilon": epsilon,
        "budget": (study.get("privacy") or {}).get("epsilon") if epsilon else None,
        "heat": heat(folder),
    }


def comparison(folders: Sequence[RunDir]) -> list[dict[str, Any]]:
    """The pooled series of several runs, to draw them over each other."""
    found = []
    for folder in folders:
        table = _Table([row for row in folder.rounds() if row["site"] == ALL_SITES], [])
        series = {name: told for name in SHARED if (told := table.pooled(name))}
        found.append({"rounds": table.rounds, "metrics": series})
    return found


def heat(folder: RunDir) -> dict[str, Any]:
    """The mean absolute shift by round, tower, part and layer; empty where no round has been kept."""
    lines = folder.shift_magnitudes()
    if not lines:
        return {}
    towers = {}
    for tower, newest in lines[-1]["towers"].items():
        kept = [line["towers"].get(tower, {}).get("parts", {}) for line in lines]
        towers[tower] = {
            "layers": newest["layers"],
            "parts": list(newest["parts"]),
            "values": [[parts.get(part) for part in newest["parts"]] for parts in kept],
        }
    return {"rounds": [line["round"] for line in lines], "towers": towers}


class _Table:
    """The rows of a run as a matrix for each figure: a line for each site, and one for the pooled model."""

    def __init__(self, rows: list[Row], sites: list[str]) -> None:
        self.rounds = sorted({row["round"] for row in rows})
        self._sites = [*sites, ALL_SITES]
        column = {number: at for at, number in enumerate(self.rounds)}
        line = {site: at for at, site in enumerate(self._sites)}
        shape = (len(self._sites), len(self.rounds))
        self._matrices = {name: np.full(shape, np.nan) for name in FIGURES if rows and name in rows[0]}
        self._letters = [[ABSENT] * len(self.rounds) for _ in sites]
        for row in rows:
            at = line[row["site"]], column[row["round"]]
            for name, matrix in self._matrices.items():
                if (value := row[name]) is not None:
                    matrix[at] = value
            if row["site"] != ALL_SITES:
                self._letters[at[0]][at[1]] = _CODES.get(row["status"], ABSENT)

    def _lines(self, name: str) -> list[list[float | None]]:
        matrix = self._matrices.get(name)
        if matrix is None or np.isnan(matrix).all():
            return []
        # More digits than a chart can show.
        lines = np.round(matrix, DIGITS).tolist()
        return [[None if value != value else value for value in line] for line in lines]

    def series(self, name: str) -> dict[str, Any]:
        """One figure of the pooled model and of each site; empty where nobody tells it."""
        lines = self._lines(name)
        return {"pooled": lines[-1], "sites": lines[:-1]} if lines else {}

    def pooled(self, name: str) -> list[float | None]:
        """One figure of the pooled model; empty where nobody tells it."""
        lines = self._lines(name)
        return lines[-1] if lines else []

    def parts(self) -> list[str]:
        """What came of each site, one letter a round."""
        return ["".join(letters) for letters in self._letters]

    def sums(self, name: str) -> list[int]:
        """One count over all sites by round."""
        return [int(value) for value in np.nansum(self._matrices[name], axis=0)] if self.rounds else []
