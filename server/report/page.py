"""Renders a report's data as an HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedsigma.common import __version__
from fedsigma.server.report import figures, tables
from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import (
    METHODS,
    format_bytes,
    format_decimal,
    format_duration,
    format_percent,
    format_timestamp,
)
from fedsigma.server.report.style import STYLE
from fedsigma.server.report.summary_text import (
    count_noun,
    gains_over_zero_shot,
    headline,
    points_over_zero_shot,
    study_settings,
)
from fedsigma.server.report.template import TEMPLATE

__all__ = ["render"]


def render(data: ReportData) -> str:
    """Return the page as HTML; all text from the run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE)
    return template.render(view=_view(data), style=Markup(STYLE))


def _view(data: ReportData) -> dict[str, Any]:
    run = data.run
    failed = run.state == "failed"
    omitted = len(data.notices) - tables.MAX_NOTICES
    largest = max((float(np.nanmax(magnitude.values)) for magnitude in data.shift_magnitudes), default=0.0)
    bold = ", the best method of each site in bold" if len(data.methods) > 1 else ""
    return {
        "name": run.study,
        "facts": _facts(data),
        "failure": (run.reason or "no reason was recorded") if failed else "",
        "headline": headline(data),
        "numbers": _numbers(data),
        "methods": tables.methods_grid(data),
        "methods_note": _methods_note(data),
        "no_results": "No results: the run failed before they were written."
        if failed
        else "No results yet: they are written after the last round.",
        "versions": tables.versions_grid(data),
        "confusion": tables.confusion_grid(data),
        "confusion_note": _confusion_note(data),
        "sites": tables.sites_grid(data),
        "sites_caption": f"Accuracy on the test images of each site{bold}"
        if data.methods
        else "Accuracy by site so far",
        "sites_figure_caption": "Accuracy at each site."
        + (" The bar connects zero-shot and federated." if gains_over_zero_shot(data) else ""),
        # The figures are markup made here; names in them were escaped when they were drawn.
        "sites_figure": Markup(figures.sites_figure(data)),
        "accuracy_figure": Markup(figures.accuracy_figure(data)),
        "accuracy_caption": _accuracy_caption(data),
        "rounds": tables.rounds_grid(data),
        "shift_figure": Markup(figures.shift_magnitude_figure(data)),
        "shift_caption": "Mean absolute shift of the singular values, by part and layer; layer 0 is nearest"
        f" the input. A stronger colour is a larger shift; the largest is {largest:.2g}."
        f" After round {data.shift_round}.",
        "shift_missing": data.shift_missing,
        "shift_magnitudes": [
            {"title": f"{m.tower.capitalize()} tower", "grid": tables.shift_magnitude_grid(m)}
            for m in data.shift_magnitudes
        ],
        "explanation": tables.explanation_grid(data.summary.get("explanation") or []),
        "explanation_by_site": tables.explanation_grids(data),
        "bytes_figure": Markup(figures.bytes_figure(data)),
        "bytes_text": f"In the whole run the sites sent {format_bytes(data.bytes_up)} and received"
        f" {format_bytes(data.bytes_down)}. Images, labels, file names and weights stayed at the sites.",
        "bytes_caption": _bytes_caption(data),
        "notices": tables.notices_grid(data),
        "notices_omitted": f"{omitted} more are in events.jsonl." if omitted > 0 else "",
        "no_notices": "None: every site replied in every round."
        if run.rounds_done or data.summary.get("versions")
        else "None so far.",
        "study": study_settings(data),
        "study_yaml": data.study_yaml,
        "version": __version__,
        "written": format_timestamp(time.time()),
        "folder": Path(run.path).resolve().name,
    }


def _facts(data: ReportData) -> list[str]:
    run = data.run
    facts = [run.state.capitalize()]
    if not data.summary.get("versions"):
        planned = run.rounds_planned
        done = "" if planned in (None, run.rounds_done) else f"{run.rounds_done} of "
        facts.append(done + count_noun(planned if planned is not None else run.rounds_done, "round"))
    if data.sites:
        facts.append(count_noun(len(data.sites), "site"))
    if run.seconds is not None and run.state in ("finished", "failed"):
        facts.append(format_duration(run.seconds))
    if run.started is not None:
        facts.append(f"started {format_timestamp(run.started)}")
    return facts


def _numbers(data: ReportData) -> dict[str, str]:
    numbers = {}
    if data.run.federated_accuracy is not None:
        label = f"federated accuracy{', all sites' if data.run.state == 'finished' else ' so far'}"
        numbers = {label: format_percent(data.run.federated_accuracy)} | points_over_zero_shot(data)
    upload = data.summary.get("bytes_up_per_site_round")
    if upload is None:
        uploads = sum(row.accepted for row in data.rounds if row.bytes_up)
        upload = data.bytes_up / uploads if uploads else None
    if upload is not None:
        numbers["upload per site and round"] = format_bytes(upload)
    if data.shift_size:
        numbers["trained values"] = f"{data.shift_size:,}".replace(",", "\u202f")
    return numbers


def _methods_note(data: ReportData) -> str:
    present = (*data.methods, "federated", "shared_only")
    missing = ", ".join(name.lower() for method, name in METHODS.items() if method not in present)
    return (
        "Accuracy is over the images of all sites; the other metrics are means of the sites' values. "
        "AUROC and F1 are macro averages over the classes. Lower is better for the expected calibration"
        f" error.{f' Not part of this study: {missing}.' if missing else ''}"
    )


def _confusion_note(data: ReportData) -> str:
    metrics = (data.methods.get("federated", {}).get("confusion") or {}).get("metrics")
    if not metrics:
        return ""
    return (
        f"Over all these images: balanced accuracy {format_percent(metrics.get('balanced_accuracy'))}, "
        f"F1 {format_decimal(metrics.get('f1'))}."
    )


def _accuracy_caption(data: ReportData) -> str:
    text = "Accuracy on the test images of each site by number of finished rounds."
    if len(data.accuracy) > figures.MAX_NAMED_SITES:
        text += " Thin lines are sites; the best and the worst at the end are named."
    return text + (" The thick line is all sites." if len(data.accuracy) > 1 else "")


def _bytes_caption(data: ReportData) -> str:
    text = "Bytes of encoded sigma shifts by round, summed over all sites."
    last = data.rounds[-1] if data.rounds else None
    if last is not None and last.bytes_down and not last.bytes_up:
        text += f" Exchange {last.round} only evaluates the model of the last round."
    return text
