"""What the pages of runs show, in the same tables and sentences as the report where both have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsigma.server.dashboard.pages.charts import charts
from fedsigma.server.dashboard.pages.run_index import RunIndex, RunLine
from fedsigma.server.report import tables
from fedsigma.server.report.data import ReportData, collect_report_data
from fedsigma.server.report.formatting import (
    NOTHING,
    format_bytes,
    format_decimal,
    format_duration,
    format_percent,
    format_points,
    format_timestamp,
)
from fedsigma.server.report.summary_text import LabelledValue, headline, study_facts
from fedsigma.server.runs.append_log import Row
from fedsigma.server.runs.rounds_table import ALL_SITES
from fedsigma.server.runs.summary import last_contacts
from fedsigma.server.runs.tail import RunTailer

__all__ = ["Sections", "event_row", "list_view", "run_view", "short"]

MOST_EVENTS = 100
NEWEST = ("accuracy", "loss", "update_norm", "update_cosine")
"""Of these a site's newest figure is shown, whichever round it is of."""
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sections:
    """A run's page: what its templates show, and the series of its charts."""

    view: dict[str, Any]
    charts: dict[str, Any]


def list_view(library: RunIndex) -> list[dict[str, Any]]:
    """A row for each run."""
    return [_list_row(line) for line in library.lines()]


def _list_row(line: RunLine) -> dict[str, Any]:
    run = line.run
    return {
        "key": line.key,
        "begun": line.begun,
        "study": run.study,
        "state": run.state,
        "reason": run.reason,
        "done": run.rounds_done,
        "planned": run.rounds_planned,
        "progress": progress(line),
        "accuracy": format_percent(run.federated_accuracy),
        "sites": run.sites or NOTHING,
        "started": format_timestamp(run.started),
        "took": format_duration(run.seconds),
    }


def progress(line: RunLine) -> float:
    """The share of the rounds that is done."""
    run = line.run
    return min(1.0, run.rounds_done / run.rounds_planned) if run.rounds_planned else 0.0


def run_view(folder: RunTailer, line: RunLine) -> Sections:
    """Everything on a run's page."""
    content = collect_report_data(folder, shift=False)
    events, rows = folder.events(), folder.rounds()
    series = charts(folder, content.study)
    view = {
        **_list_row(line),
        "lead": headline(content),
        "numbers": _numbers(content, rows, events),
        "methods": tables.methods_grid(content),
        "versions": tables.versions_grid(content),
        "confusion": tables.confusion_grid(content),
        "explanation": tables.explanation_grid(content.summary.get("explanation") or []),
        "notices": tables.notices_grid(content),
        "sites_now": sites_now(rows, events),
        "rounds": tables.rounds_grid(content),
        "drift_words": drift_words(content.study, bool(series["drift"])),
        "privacy_words": privacy_words(content),
        "events": [tuple(event_row(event).values()) for event in reversed(events[-MOST_EVENTS:])],
        "events_left": max(0, len(events) - MOST_EVENTS),
        "study_facts": study_facts(content),
        "explanation_by_site": tables.explanation_grids(content),
        "study_yaml": content.study_yaml,
        "has_report": folder.report_path.is_file(),
    }
    return Sections(view=view, charts=series)


def _numbers(content: ReportData, rows: list[Row], events: list[Row]) -> list[LabelledValue]:
    run = content.run
    facts = [LabelledValue(what="accuracy, all sites", value=format_percent(run.federated_accuracy))]
    if run.federated_accuracy is not None and content.zero_shot is not None:
        gain = format_points(run.federated_accuracy - content.zero_shot)
        facts.append(LabelledValue(what="points against zero-shot", value=gain))
    last = next((line for line in reversed(content.lines) if line.bytes_up), None)
    if last is not None:
        now = f"{format_bytes(last.bytes_up)} up, {format_bytes(last.bytes_down)} down"
        total = f"{format_bytes(content.bytes_up)} up, {format_bytes(content.bytes_down)} down"
        facts += [
            LabelledValue(what=f"round {last.round}", value=now),
            LabelledValue(what="all rounds", value=total),
        ]
    if share := full_share(content, rows, events):
        facts.append(LabelledValue(what="of full fine-tuning's bytes", value=share))
    return facts


def full_share(content: ReportData, rows: list[Row], events: list[Row]) -> str:
    """The bytes of this run as a share of sending all weights as float32 as often; empty if not known."""
    ready = next((e for e in reversed(events) if e["kind"] == "model_ready"), {})
    if not isinstance(ready.get("parameters"), int) or not content.bytes_up:
        return ""
    sent = sum(row["bytes_up"] > 0 for row in rows) + sum(row["bytes_down"] > 0 for row in rows)
    share = (content.bytes_up + content.bytes_down) / (sent * FLOAT_BYTES * ready["parameters"])
    return f"{100 * share:.2g}%"


def sites_now(rows: list[Row], events: list[Row]) -> tables.Grid:
    """A row for each site: what came of it last, when it was heard of, and the newest figures it told."""
    told: dict[str, Row] = {}
    missed: dict[str, int] = {}
    for row in rows:
        known = told.setdefault(row["site"], {})
        known |= {"status": row["status"], "round": row["round"]}
        for name in NEWEST:
            if row.get(name) is not None:
                known[name] = row[name]
        missed[row["site"]] = missed.get(row["site"], 0) + (row["status"] not in ("accepted", "pooled"))
    heard, (versions, refused) = last_contacts(events), _standing(events)
    found = []
    for site in dict.fromkeys((*told, *heard, *refused)):
        if site == ALL_SITES:
            continue
        row = told.get(site, {})
        newest = (
            f"{row['status']} in round {row['round']}"
            if row
            else "takes no part"
            if site in refused
            else NOTHING
        )
        cells = [
            newest,
            str(missed.get(site, 0)),
            format_timestamp(heard.get(site)),
            versions.get(site, NOTHING),
        ]
        cells += [format_percent(row.get("accuracy")), format_decimal(row.get("loss"))]
        cells += [format_decimal(row.get("update_norm")), format_decimal(row.get("update_cosine"))]
        found.append(tables.Row(name=site, cells=cells))
    heads = ["Site", "Newest", "Lost", "Last contact", "Version", "Accuracy", "Loss", "Change", "Cosine"]
    return tables.Grid(heads=heads, rows=found, texts=frozenset({0, 1, 3, 4}))


def _standing(events: list[Row]) -> tuple[dict[str, str], set[str]]:
    """Which version each site told, and which were refused and did not come back."""
    versions: dict[str, str] = {}
    refused: set[str] = set()
    for event in events:
        site = event.get("site")
        if event["kind"] == "site_refused" and isinstance(site, str):
            refused.add(site)
        elif event["kind"] == "site_ready" and isinstance(site, str):
            refused.discard(site)
            versions[site] = str(event.get("version") or NOTHING)
    return versions, refused


def drift_words(study: dict[str, Any], told: bool) -> str:
    """Why there is no drift to see; empty where there is."""
    federation, privacy = study.get("federation") or {}, study.get("privacy") or {}
    if federation.get("masking"):
        return (
            "The sites mask what they send, so the server sees their sum alone: no site's change, no drift."
        )
    if privacy.get("level") == "site":
        return "This study hides whole sites: how far a single site moved is not kept."
    return "" if told else "No site's change has been recorded."


def privacy_words(content: ReportData) -> str:
    """What has been spent of the privacy budget, in a sentence; empty without one."""
    asked = content.study.get("privacy") or {}
    if asked.get("level", "none") == "none":
        return ""
    spent = NOTHING if content.epsilon is None else f"{content.epsilon:.2f}"
    budget = f"Epsilon {spent} of {asked['epsilon']:g} is spent, at delta {asked['delta']:g}."
    return f"Hides each {asked['level']}. {budget}"


def event_row(event: Row) -> dict[str, str]:
    """An event in words."""
    hidden = ("time", "kind", "sha256", "metrics")
    told = {key: value for key, value in event.items() if key not in hidden}
    words = ", ".join(f"{key} {short(value)}" for key, value in told.items() if value not in ("", None))
    time = event.get("time")
    return {
        "time": time if isinstance(time, str) else format_timestamp(time),
        "kind": event["kind"].replace("_", " "),
        "words": words,
    }


def short(value: Any) -> str:
    """A value of an event or a study as text, of a long list its beginning."""
    if isinstance(value, list):
        return ", ".join(map(str, value[:6])) + (f" and {len(value) - 6} more" if len(value) > 6 else "")
    return str(value)
