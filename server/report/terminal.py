"""The results of a run as a table for the terminal."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedsigma.server.report.formatting import METHODS, format_percent, format_points, truncate

__all__ = ["summary_table"]

MAX_SITES = 8
"""Up to so many sites each have a column; more are shown as lowest, median and highest."""


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the accuracy of each method with a column per site.

    Args:
        summary: Content of `summary.json`.

    Returns:
        The table, to be printed with rich.
    """
    methods = {name: summary[name] for name in METHODS if isinstance(summary.get(name), dict)}
    methods |= summary.get("versions") or {}
    sites = list(dict.fromkeys(site for entry in methods.values() for site in entry.get("per_site") or {}))
    few = len(sites) <= MAX_SITES
    table = Table(
        title=Text(f"Accuracy: {summary.get('study', 'this study')}"), title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("Method", no_wrap=True)
    table.add_column("All sites", justify="right", style="bold")
    for site in sites if few else ("Lowest site", "Median site", "Highest site"):
        table.add_column(Text(truncate(site, 20)), justify="right")
    for name, entry in methods.items():
        style = "green" if name == "federated" else ""
        cells = _cells(entry.get("per_site") or {}, sites, few=few)
        table.add_row(METHODS.get(name, name), format_percent(entry.get("accuracy")), *cells, style=style)
        if name == "local_only" and entry.get("everywhere") is not None:
            cells = _cells(entry.get("everywhere_per_site") or {}, sites, few=few)
            everywhere = format_percent(entry["everywhere"])
            table.add_row("  evaluated at all sites", everywhere, *cells, style="dim")
    _add_gain(table, methods, sites, few=few)
    return table


def _cells(per_site: dict[str, float], sites: list[str], *, few: bool) -> list[str]:
    if few:
        return [format_percent(per_site.get(site)) for site in sites]
    values = [value for value in per_site.values() if value is not None]
    return [format_percent(f(values) if values else None) for f in (min, median, max)]


def _add_gain(table: Table, methods: dict[str, dict[str, Any]], sites: list[str], *, few: bool) -> None:
    """Add a last row: federated minus zero-shot, in percentage points."""
    if "zero_shot" not in methods or "federated" not in methods:
        return
    before, after = (methods[name].get("per_site") or {} for name in ("zero_shot", "federated"))
    gains = {s: after[s] - before[s] for s in sites if before.get(s) is not None and after.get(s) is not None}
    start, end = (methods[name].get("accuracy") for name in ("zero_shot", "federated"))
    total = format_points(None if end is None or start is None else end - start)
    if few:
        cells = [format_points(gains.get(site)) for site in sites]
    else:
        cells = [format_points(f(gains.values()) if gains else None) for f in (min, median, max)]
    table.add_section()
    table.add_row("Points over zero-shot", total, *cells)
