"""The numbers behind the charts of one run, in the shape that the page's script draws.

Series are lists by round with null where nothing was told, so that fifty sites over two hundred rounds stay
a few hundred kilobytes. Shares lie between 0 and 1, bytes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsigma.common.names import METRICS
from fedsigma.server.store import POOLED, Row, RunFolder

__all__ = ["charts", "comparison"]

SHARED = (*METRICS, "loss")
"""What is drawn for the pooled model and for each site."""
DRIFT = ("change_norm", "change_cosine", "shift_norm")
_CODES = {"accepted": "a", "late": "l", "rejected": "r", "failed": "f"}
ABSENT = "."


def charts(folder: RunFolder, study: dict[str, Any]) -> dict[str, Any]:
    """All series of one run."""
    rows = folder.rounds()
    rounds = sorted({row["round"] for row in rows})
    sites = list(dict.fromkeys(row["site"] for row in rows if row["site"] != POOLED))
    table = _Table(rows, rounds)
    return {
        "rounds": rounds,
        "sites": sites,
        "metrics": {name: told for name in SHARED if (told := table.of(name, sites))},
        "drift": {name: told for name in DRIFT if (told := table.of(name, sites))},
        "part": {site: table.codes(site) for site in sites},
        "bytes": {way: table.sums(f"bytes_{way}") for way in ("up", "down")},
        "epsilon": table.series("epsilon", POOLED) if table.has("epsilon") else [],
        "budget": (study.get("privacy") or {}).get("epsilon") if table.has("epsilon") else None,
        "heat": heat(folder),
    }


def comparison(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The pooled series of several runs, to draw them over each other."""
    found = []
    for folder in folders:
        rows = [row for row in folder.rounds() if row["site"] == POOLED]
        table = _Table(rows, [row["round"] for row in rows])
        series = {name: table.series(name, POOLED) for name in SHARED if table.has(name)}
        found.append({"rounds": table.rounds, "metrics": series})
    return found


def heat(folder: RunFolder) -> dict[str, Any]:
    """The mean absolute shift by round, tower, part and layer; empty where no round has been kept."""
    lines = folder.heats()
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


def _short(value: float) -> float:
    """Four digits, which is more than a chart can show; formatting is slow, so only where it is needed."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


class _Table:
    """The rows of a run by site and round."""

    def __init__(self, rows: list[Row], rounds: list[int]) -> None:
        self.rounds = rounds
        self._rows = {(row["round"], row["site"]): row for row in rows}
        self._names = {name for row in rows for name, value in row.items() if value is not None}

    def has(self, name: str) -> bool:
        """Whether any row tells this metric."""
        return name in self._names

    def series(self, name: str, site: str) -> list[float | None]:
        """One metric of one site by round."""
        found = (self._rows.get((number, site), {}).get(name) for number in self.rounds)
        return [None if value is None else _short(value) for value in found]

    def of(self, name: str, sites: list[str]) -> dict[str, Any]:
        """One metric of the pooled model and of each site; empty where nobody tells it."""
        if not self.has(name):
            return {}
        told = {"pooled": self.series(name, POOLED), "sites": [self.series(name, site) for site in sites]}
        return told

    def codes(self, site: str) -> str:
        """What came of a site, one letter a round."""
        found = (self._rows.get((number, site)) for number in self.rounds)
        return "".join(_CODES.get(row["status"], ABSENT) if row else ABSENT for row in found)

    def sums(self, name: str) -> list[int]:
        """One count over all sites by round."""
        totals = dict.fromkeys(self.rounds, 0)
        for (number, _), row in self._rows.items():
            totals[number] += row[name]
        return list(totals.values())
