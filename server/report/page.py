"""From a report's content to its page."""

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
    format_points,
    format_timestamp,
)
from fedsigma.server.report.style import STYLE
from fedsigma.server.report.summary_text import LabelledValue, counted, headline, pairs, study_facts
from fedsigma.server.report.template import TEMPLATE

__all__ = ["render"]


def render(content: ReportData) -> str:
    """The whole page. All text that comes from a run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE)
    return template.render(view=_view(content), style=Markup(STYLE))


def _view(content: ReportData) -> dict[str, Any]:
    run = content.run
    notices = tables.notices_grid(content)
    left = len(content.notices) - len(notices.rows)
    both = pairs(content, "zero_shot", "federated")
    return {
        "name": run.study,
        "facts": _facts(content),
        "failure": (run.reason or "no reason was recorded") if run.state == "failed" else "",
        "lead": headline(content),
        "numbers": _numbers(content),
        "methods": tables.methods_grid(content),
        "methods_note": _methods_note(content),
        "no_results": _no_results(content),
        "versions": tables.versions_grid(content),
        "confusion": tables.confusion_grid(content),
        "confusion_note": _confusion_note(content),
        "sites": tables.sites_grid(content),
        "sites_caption": _sites_caption(content),
        "sites_drawing_caption": "Accuracy at each site."
        + (" The bar leads from zero-shot to federated." if both else ""),
        # The drawings are markup made here; the names in them were escaped when they were drawn.
        "sites_drawing": Markup(figures.sites_figure(content)),
        "accuracy_drawing": Markup(figures.accuracy_figure(content)),
        "accuracy_caption": _accuracy_caption(content),
        "rounds": tables.rounds_grid(content),
        "heat_drawing": Markup(figures.heat_figure(content)),
        "heat_caption": _heat_caption(content),
        "heat_problem": content.heat_problem,
        "heats": [
            {"title": f"{heat.tower.capitalize()} tower", "grid": tables.heat_grid(heat)}
            for heat in content.shift_magnitudes
        ],
        "explanation": tables.explanation_grid(content.summary.get("explanation") or []),
        "explanation_by_site": tables.explanation_grids(content),
        "bytes_drawing": Markup(figures.bytes_figure(content)),
        "bytes_words": _bytes_words(content),
        "bytes_caption": _bytes_caption(content),
        "notices": notices,
        "notices_left": f"{left} more are in events.jsonl." if left else "",
        "no_notices": "Nothing: every site replied in every round."
        if run.rounds_done or content.summary.get("versions")
        else "Nothing so far.",
        "study": study_facts(content),
        "study_yaml": content.study_yaml,
        "version": __version__,
        "written": format_timestamp(time.time()),
        "folder": Path(run.path).resolve().name,
    }


def _rounds_words(content: ReportData) -> str:
    run = content.run
    if run.rounds_planned is None or run.rounds_planned == run.rounds_done:
        return counted(run.rounds_done, "round")
    return f"{run.rounds_done} of {counted(run.rounds_planned, 'round')}"


def _facts(content: ReportData) -> list[str]:
    run = content.run
    facts = [run.state.capitalize()]
    if not content.summary.get("versions"):
        facts.append(_rounds_words(content))
    if content.sites:
        facts.append(counted(len(content.sites), "site"))
    if run.seconds is not None and run.state in ("finished", "failed"):
        facts.append(format_duration(run.seconds))
    if run.started is not None:
        facts.append(f"started {format_timestamp(run.started)}")
    return facts


def _numbers(content: ReportData) -> list[LabelledValue]:
    run, upload = content.run, content.summary.get("bytes_up_per_site_round")
    label = "federated accuracy, all sites" if run.state == "finished" else "federated accuracy so far"
    facts = []
    if run.federated_accuracy is not None:
        facts.append(LabelledValue(what=label, value=format_percent(run.federated_accuracy)))
    if run.federated_accuracy is not None and content.zero_shot is not None:
        gain = format_points(run.federated_accuracy - content.zero_shot)
        facts.append(LabelledValue(what="points against zero-shot", value=gain))
    if upload is None:
        sent = sum(line.sites for line in content.lines if line.bytes_up)
        upload = content.bytes_up / sent if sent else None
    if upload is not None:
        facts.append(LabelledValue(what="one upload of one site", value=format_bytes(upload)))
    if content.sigma_values:
        facts.append(
            LabelledValue(what="trained values", value=f"{content.sigma_values:,}".replace(",", "\u202f"))
        )
    return facts


def _methods_note(content: ReportData) -> str:
    missing = [METHODS[n].lower() for n in METHODS if n not in (*content.methods, "federated", "shared_only")]
    words = (
        "Accuracy is over the images of all sites; the other metrics are means of the sites' values. "
        "AUROC and F1 are means over the classes. Calibration error (expected) is better when lower."
    )
    if missing:
        words += f" Not part of this study: {', '.join(missing)}."
    return words


def _confusion_note(content: ReportData) -> str:
    known = (content.methods.get("federated", {}).get("confusion") or {}).get("metrics")
    if not known:
        return ""
    return (
        f"Of all these images together: balanced accuracy {format_percent(known.get('balanced_accuracy'))}, "
        f"F1 {format_decimal(known.get('f1'))}."
    )


def _no_results(content: ReportData) -> str:
    if content.run.state == "failed":
        return "There are no results: the run failed before they were written."
    return "There are no results yet: they are written when the last round is finished."


def _sites_caption(content: ReportData) -> str:
    if not content.methods:
        return "Accuracy by site so far"
    bold = ", the best method of each site in bold" if len(content.methods) > 1 else ""
    return f"Accuracy on the test images of each site{bold}"


def _accuracy_caption(content: ReportData) -> str:
    many = len(content.accuracy) > figures.FEW
    words = "Accuracy on the test images of each site, after so many finished rounds."
    if many:
        words += " Thin lines are sites; the best and the worst at the end are named."
    return words + (" The strong line is all sites together." if len(content.accuracy) > 1 else "")


def _heat_caption(content: ReportData) -> str:
    tops = [float(np.nanmax(heat.values)) for heat in content.shift_magnitudes]
    return (
        "Mean absolute shift of the singular values, by part and layer; layer 0 is nearest the input. "
        f"The stronger the colour the larger the shift; the strongest is {max(tops, default=0.0):.2g}. "
        f"After round {content.sigma_round}."
    )


def _bytes_words(content: ReportData) -> str:
    return (
        f"In the whole run the sites sent {format_bytes(content.bytes_up)} and received "
        f"{format_bytes(content.bytes_down)}. Images, labels, file names and weights stayed where they were."
    )


def _bytes_caption(content: ReportData) -> str:
    words = "Bytes of coded sigma shifts by round, all sites together."
    last = content.lines[-1] if content.lines else None
    if last is not None and last.bytes_down and not last.bytes_up:
        words += f" Exchange {last.round} only evaluates the model of the last round."
    return words
