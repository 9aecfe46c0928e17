"""The content of the pages of runs; tables and sentences are shared with the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.utils.json_lines import Row
from fedsigma.server.dashboard.pages.charts import run_charts
from fedsigma.server.dashboard.pages.run_index import RunEntry, RunIndex
from fedsigma.server.report import tables
from fedsigma.server.report.data import ReportData, collect_report_data
from fedsigma.server.report.formatting import (
    MISSING,
    format_bytes,
    format_decimal,
    format_duration,
    format_percent,
    format_timestamp,
)
from fedsigma.server.report.summary_text import headline, points_over_zero_shot, study_settings
from fedsigma.server.runs.summary import last_contacts
from fedsigma.server.runs.tail import RunTailer

__all__ = ["View", "describe_event", "format_value", "list_view", "run_view"]

MAX_EVENTS = 100
LATEST_COLUMNS = ("accuracy", "loss", "update_norm", "update_cosine")
"""Columns of rounds.csv whose latest value is shown for each site."""
FLOAT32_BYTES = 4


View = tuple[dict[str, Any], dict[str, Any]]
"""Values for a page's templates, and series for its charts."""


def list_view(run_index: RunIndex) -> list[dict[str, Any]]:
    """Return a row for each run."""
    return [_list_row(entry) for entry in run_index.list_runs()]


def _list_row(entry: RunEntry) -> dict[str, Any]:
    run = entry.summary
    return {
        "key": entry.key,
        "has_page": entry.started,
        "study": run.study,
        "state": run.state,
        "reason": run.reason,
        "rounds_done": run.rounds_done,
        "rounds_planned": run.rounds_planned,
        "progress": min(1.0, run.rounds_done / run.rounds_planned) if run.rounds_planned else 0.0,
        "accuracy": format_percent(run.federated_accuracy),
        "sites": run.sites or MISSING,
        "started": format_timestamp(run.started),
        "duration": format_duration(run.seconds),
    }


def run_view(tailer: RunTailer, entry: RunEntry) -> View:
    """Return the content of a run's page."""
    data = collect_report_data(tailer, read_shift=False)
    events, rows = tailer.events(), tailer.rounds()
    charts = run_charts(tailer, data.study)
    view = {
        **_list_row(entry),
        "headline": headline(data),
        "numbers": _numbers(data, rows, events),
        "methods": tables.methods_grid(data),
        "versions": tables.versions_grid(data),
        "confusion": tables.confusion_grid(data),
        "explanation": tables.explanation_grid(data.summary.get("explanation") or []),
        "notices": tables.notices_grid(data),
        "site_status": _site_status_grid(rows, events),
        "rounds": tables.rounds_grid(data),
        "updates_note": _updates_note(data.study, bool(charts["updates"])),
        "privacy_note": _privacy_note(data),
        "events": [tuple(describe_event(event).values()) for event in reversed(events[-MAX_EVENTS:])],
        "events_omitted": max(0, len(events) - MAX_EVENTS),
        "study_settings": study_settings(data),
        "explanation_by_site": tables.explanation_grids(data),
        "study_yaml": data.study_yaml,
        "has_report": tailer.report_path.is_file(),
    }
    return view, charts


def _numbers(data: ReportData, rows: list[Row], events: list[Row]) -> dict[str, str]:
    accuracy = format_percent(data.run.federated_accuracy)
    numbers = {"accuracy, all sites": accuracy, **points_over_zero_shot(data)}
    if exchanged := [row for row in data.rounds if row.bytes_up]:
        last = exchanged[-1]
        numbers[f"round {last.round}"] = (
            f"{format_bytes(last.bytes_up)} up, {format_bytes(last.bytes_down)} down"
        )
        numbers["all rounds"] = f"{format_bytes(data.bytes_up)} up, {format_bytes(data.bytes_down)} down"
    ready = next((event for event in reversed(events) if event["kind"] == "model_ready"), {})
    if isinstance(ready.get("parameters"), int) and data.bytes_up:
        messages = sum(row["bytes_up"] > 0 for row in rows) + sum(row["bytes_down"] > 0 for row in rows)
        share = (data.bytes_up + data.bytes_down) / (messages * FLOAT32_BYTES * ready["parameters"])
        numbers["of the bytes of full fine-tuning"] = f"{100 * share:.2g}%"
    return numbers


def _site_status_grid(rows: list[Row], events: list[Row]) -> tables.Grid:
    """Return a row per site with its latest status, last contact and latest values."""
    latest: dict[str, Row] = {}
    missed: Counter[str] = Counter()
    for row in rows:
        if row["site"] == ALL_SITES:
            continue
        values = latest.setdefault(row["site"], {})
        values["status"] = f"{row['status']} in round {row['round']}"
        values |= {name: row[name] for name in LATEST_COLUMNS if row.get(name) is not None}
        missed[row["site"]] += row["status"] != "accepted"
    contacts, (versions, refused) = last_contacts(events), _versions_and_refused(events)
    grid_rows = []
    for site in dict.fromkeys((*latest, *contacts, *refused)):
        values = latest.get(site, {"status": "refused" if site in refused else MISSING})
        cells = [
            values["status"],
            str(missed[site]),
            format_timestamp(contacts.get(site)),
            versions.get(site, MISSING),
            format_percent(values.get("accuracy")),
            *(format_decimal(values.get(name)) for name in LATEST_COLUMNS[1:]),
        ]
        grid_rows.append(tables.Row(name=site, cells=cells))
    header = ["Site", "Status", "Missed", "Last contact", "Version"]
    header += ["Accuracy", "Loss", "Update norm", "Cosine"]
    return tables.Grid(header=header, rows=grid_rows, text_columns=frozenset({0, 1, 3, 4}))


def _versions_and_refused(events: list[Row]) -> tuple[dict[str, str], set[str]]:
    """Return each site's version of FedSigma, and the sites that are currently refused."""
    versions: dict[str, str] = {}
    refused: set[str] = set()
    for event in events:
        site = event.get("site")
        if event["kind"] == "site_refused" and isinstance(site, str):
            refused.add(site)
        elif event["kind"] == "site_ready" and isinstance(site, str):
            refused.discard(site)
            versions[site] = str(event.get("version") or MISSING)
    return versions, refused


def _updates_note(study: dict[str, Any], recorded: bool) -> str:
    """Return why the chart of the sites' updates is empty; empty if updates were recorded."""
    federation, privacy = study.get("federation") or {}, study.get("privacy") or {}
    if federation.get("masking"):
        return "With secure aggregation the server only learns the sum of the updates, not those of a site."
    if privacy.get("level") == "site":
        return "This study has differential privacy for sites, so updates of single sites are not recorded."
    return "" if recorded else "No update of a site has been recorded."


def _privacy_note(data: ReportData) -> str:
    """Return how much of the privacy budget is spent, as a sentence; empty without differential privacy."""
    privacy = data.study.get("privacy") or {}
    if privacy.get("level", "none") == "none":
        return ""
    spent = MISSING if data.epsilon is None else f"{data.epsilon:.2f}"
    return (
        f"Differential privacy for each {privacy['level']}: epsilon {spent} of {privacy['epsilon']:g}"
        f" is spent, at delta {privacy['delta']:g}."
    )


def describe_event(event: Row) -> dict[str, str]:
    """Return the time, kind and other fields of an event as text."""
    hidden = ("time", "kind", "sha256", "metrics")
    fields = {key: value for key, value in event.items() if key not in hidden and value not in ("", None)}
    time = event.get("time")
    return {
        "time": time if isinstance(time, str) else format_timestamp(time),
        "kind": event["kind"].replace("_", " "),
        "details": ", ".join(f"{key} {format_value(value)}" for key, value in fields.items()),
    }


def format_value(value: Any) -> str:
    """Return a value of an event or a study as text; long lists are cut."""
    if isinstance(value, list):
        return ", ".join(map(str, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "")
    return str(value)
