"""The results of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Return the accuracy of each method in summary.json, with a column per site, as a table of rich."""
    methods = {name: summary[name] for name in METHODS if isinstance(summary.get(name), dict)}
    methods |= summary.get("versions") or {}
    sites = list(dict.fromkeys(site for entry in methods.values() for site in entry.get("per_site") or {}))
    title = Text(f"Accuracy: {summary.get('study', 'this study')}")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("Method", no_wrap=True)
    table.add_column("All sites", justify="right", style="bold")
    for site in sites if len(sites) <= MAX_SITES else ("Lowest site", "Median site", "Highest site"):
        table.add_column(Text(truncate(site, 20)), justify="right")
    for name, entry in methods.items():
        style = "green" if name == "federated" else ""
        cells = _cells(entry.get("per_site") or {}, sites)
        table.add_row(METHODS.get(name, name), format_percent(entry.get("accuracy")), *cells, style=style)
        if name == "local_only" and entry.get("everywhere") is not None:
            cells = _cells(entry.get("everywhere_per_site") or {}, sites)
            everywhere = format_percent(entry["everywhere"])
            table.add_row("  evaluated at all sites", everywhere, *cells, style="dim")
    if "zero_shot" in methods and "federated" in methods:
        before, after = (methods[name].get("per_site") or {} for name in ("zero_shot", "federated"))
        gains = {site: _difference(after.get(site), before.get(site)) for site in sites}
        total = _difference(methods["federated"].get("accuracy"), methods["zero_shot"].get("accuracy"))
        table.add_section()
        table.add_row("Points over zero-shot", format_points(total), *_cells(gains, sites, format_points))
    return table


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _cells(
    per_site: Mapping[str, float | None],
    sites: list[str],
    format_value: Callable[[float | None], str] = format_percent,
) -> list[str]:
    if len(sites) <= MAX_SITES:
        return [format_value(per_site.get(site)) for site in sites]
    values = [value for value in per_site.values() if value is not None]
    return [format_value(f(values) if values else None) for f in (min, median, max)]
