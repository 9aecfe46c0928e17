"""The results of a run as a table for the terminal."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedsigma.server.report.formatting import METHODS, format_percent, format_points, shorten

__all__ = ["summary_table"]

MOST_SITES = 8  # wider tables do not fit a terminal; more sites are told by lowest, median and highest


def summary_table(summary: dict[str, Any]) -> Table:
    """The methods side by side, with a column per site, from what `summary.json` holds."""
    methods = {name: summary[name] for name in METHODS if isinstance(summary.get(name), dict)}
    methods |= summary.get("versions") or {}
    sites = list(dict.fromkeys(site for entry in methods.values() for site in entry.get("per_site") or {}))
    few = len(sites) <= MOST_SITES
    table = Table(
        title=Text(f"Accuracy: {summary.get('study', 'this study')}"), title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("Method", no_wrap=True)
    table.add_column("All sites", justify="right", style="bold")
    for site in sites if few else ("Lowest site", "Median site", "Highest site"):
        table.add_column(Text(shorten(site, 20)), justify="right")
    for name, entry in methods.items():
        style = "green" if name == "federated" else ""
        cells = _cells(entry.get("per_site") or {}, sites, few=few)
        table.add_row(METHODS.get(name, name), format_percent(entry.get("accuracy")), *cells, style=style)
        if name == "local_only" and entry.get("everywhere") is not None:
            cells = _cells(entry.get("everywhere_per_site") or {}, sites, few=few)
            table.add_row("  judged at all sites", format_percent(entry["everywhere"]), *cells, style="dim")
    _gain(table, methods, sites, few=few)
    return table


def _cells(per_site: dict[str, float], sites: list[str], *, few: bool) -> list[str]:
    if few:
        return [format_percent(per_site.get(site)) for site in sites]
    known = [value for value in per_site.values() if value is not None]
    return [format_percent(f(known)) if known else format_percent(None) for f in (min, median, max)]


def _gain(table: Table, methods: dict[str, dict[str, Any]], sites: list[str], *, few: bool) -> None:
    """A last line: federated less zero-shot, in points."""
    if "zero_shot" not in methods or "federated" not in methods:
        return
    before, after = (methods[name].get("per_site") or {} for name in ("zero_shot", "federated"))
    gains = {s: after[s] - before[s] for s in sites if before.get(s) is not None and after.get(s) is not None}
    end, start = (methods[name].get("accuracy") for name in ("federated", "zero_shot"))
    total = format_points(None if end is None or start is None else end - start)
    if few:
        cells = [format_points(gains.get(site)) for site in sites]
    else:
        cells = [
            format_points(f(gains.values())) if gains else format_points(None) for f in (min, median, max)
        ]
    table.add_section()
    table.add_row("Points over zero-shot", total, *cells)
