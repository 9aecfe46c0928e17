"""Comparison of two runs: settings that differ, and results."""

from __future__ import annotations

from typing import Any

from fedsigma.common.config.schema import flatten
from fedsigma.server.dashboard.pages.charts import comparison_charts
from fedsigma.server.dashboard.pages.run_view import View, format_value
from fedsigma.server.report.data import ReportData, collect_report_data
from fedsigma.server.report.formatting import (
    METHODS,
    MISSING,
    format_bytes,
    format_duration,
    format_percent,
    format_points,
)
from fedsigma.server.runs.tail import RunTailer

__all__ = ["compare_view"]


def compare_view(first: RunTailer, second: RunTailer) -> View:
    """Return what the comparison page shows."""
    runs = [collect_report_data(tailer, read_shift=False) for tailer in (first, second)]
    view = {
        "settings": _differing_settings(*(data.study for data in runs)),
        "results": _results(runs),
        "sites": _accuracy_by_site(runs),
    }
    return view, {"runs": comparison_charts((first, second))}


def _differing_settings(*studies: dict[str, Any]) -> list[tuple[str, ...]]:
    flat = [dict(flatten(study)) for study in studies]
    rows = []
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = (settings.get(name) for settings in flat)
        texts = [MISSING if value in (None, {}) else format_value(value) for value in values]
        if len(set(texts)) > 1:
            rows.append((name, *texts))
    return rows


def _results(runs: list[ReportData]) -> list[tuple[str, ...]]:
    rows = [
        ("Rounds done", *(str(data.run.rounds_done) for data in runs)),
        ("Latest accuracy", *(format_percent(data.run.federated_accuracy) for data in runs)),
    ]
    for method, name in METHODS.items():
        values = [data.methods.get(method, {}).get("accuracy") for data in runs]
        if any(value is not None for value in values):
            rows.append((name, *(format_percent(value) for value in values)))
    return [
        *rows,
        ("From the sites", *(format_bytes(data.bytes_up) for data in runs)),
        ("To the sites", *(format_bytes(data.bytes_down) for data in runs)),
        ("Duration", *(format_duration(data.run.seconds) for data in runs)),
    ]


def _accuracy_by_site(runs: list[ReportData]) -> list[tuple[str, str, str, str]]:
    newest = [
        {site: values[max(values)] for site, values in data.accuracy.items() if values} for data in runs
    ]
    rows = []
    for site in dict.fromkeys((*newest[0], *newest[1])):
        a, b = (accuracy.get(site) for accuracy in newest)
        difference = format_points(b - a) if a is not None and b is not None else MISSING
        rows.append((site, format_percent(a), format_percent(b), difference))
    return rows
