"""Two runs beside each other: what their studies set differently, and what came of each."""

from __future__ import annotations

from typing import Any

from fedsigma.server.dashboard.pages.charts import comparison
from fedsigma.server.dashboard.pages.run_view import Sections, short
from fedsigma.server.report.data import ReportData, collect_report_data
from fedsigma.server.report.formatting import (
    METHODS,
    NOTHING,
    format_bytes,
    format_duration,
    format_percent,
    format_points,
)
from fedsigma.server.runs.tail import RunTailer

__all__ = ["compare_view"]


def compare_view(first: RunTailer, second: RunTailer) -> Sections:
    """What the page shows."""
    contents = [collect_report_data(folder, shift=False) for folder in (first, second)]
    return Sections(
        view={
            "settings": _settings(*(content.study for content in contents)),
            "results": _results(contents),
            "sites": _by_site(contents),
        },
        charts={"runs": comparison((first, second))},
    )


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    one, two = flat(first), flat(second)
    names = dict.fromkeys((*one, *two))
    return [(n, one.get(n, NOTHING), two.get(n, NOTHING)) for n in names if one.get(n) != two.get(n)]


def flat(values: dict[str, Any], before: str = "") -> dict[str, str]:
    """A study's settings by their full names, `federation.rounds` and so on."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = short(value) if value is not None else NOTHING
    return found


def _results(contents: list[ReportData]) -> list[tuple[str, ...]]:
    rows = [("Rounds done", *(str(c.run.rounds_done) for c in contents))]
    rows.append(("Newest accuracy", *(format_percent(c.run.federated_accuracy) for c in contents)))
    for name, words in METHODS.items():
        values = [c.methods.get(name, {}).get("accuracy") for c in contents]
        if any(value is not None for value in values):
            rows.append((words, *(format_percent(value) for value in values)))
    rows.append(("From the sites", *(format_bytes(c.bytes_up) for c in contents)))
    rows.append(("To the sites", *(format_bytes(c.bytes_down) for c in contents)))
    rows.append(("Time", *(format_duration(c.run.seconds) for c in contents)))
    return rows


def _by_site(contents: list[ReportData]) -> list[tuple[str, str, str, str]]:
    newest = [{site: told[max(told)] for site, told in c.accuracy.items() if told} for c in contents]
    found = []
    for site in dict.fromkeys((*newest[0], *newest[1])):
        one, two = (told.get(site) for told in newest)
        both = format_points(two - one) if one is not None and two is not None else NOTHING
        found.append((site, format_percent(one), format_percent(two), both))
    return found
