"""From a report's content to its page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedsigma import __version__
from fedsigma.server.report import figures, tables
from fedsigma.server.report.content import Content
from fedsigma.server.report.style import STYLE
from fedsigma.server.report.template import TEMPLATE
from fedsigma.server.report.words import METHODS, amount, decimal, duration, moment, percent, points

__all__ = ["render"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A value with its name."""

    what: str
    value: str


def render(content: Content) -> str:
    """The whole page. All text that comes from a run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(TEMPLATE)
    return template.render(view=_view(content), style=Markup(STYLE))


def _view(content: Content) -> dict[str, Any]:
    run = content.overview
    notices = tables.notices_grid(content)
    left = len(content.notices) - len(notices.rows)
    both = _pairs(content, "zero_shot", "federated")
    return {
        "name": run.study,
        "facts": _facts(content),
        "failure": (run.reason or "no reason was recorded") if run.state == "failed" else "",
        "lead": _lead(content),
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
            for heat in content.heats
        ],
        "explanation": tables.explanation_grid(content.summary.get("explanation") or []),
        "explanation_by_site": [
            {"site": site, "grid": tables.explanation_grid(rows)}
            for site, rows in (content.summary.get("explanation_by_site") or {}).items()
        ],
        "bytes_drawing": Markup(figures.bytes_figure(content)),
        "bytes_words": _bytes_words(content),
        "bytes_caption": _bytes_caption(content),
        "notices": notices,
        "notices_left": f"{left} more are in events.jsonl." if left else "",
        "no_notices": "Nothing: every site replied in every round."
        if run.rounds_done or content.summary.get("versions")
        else "Nothing so far.",
        "study": _study(content),
        "study_yaml": content.study_yaml,
        "version": __version__,
        "written": moment(time.time()),
        "folder": Path(run.path).resolve().name,
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rounds_words(content: Content) -> str:
    run = content.overview
    if run.rounds_planned is None or run.rounds_planned == run.rounds_done:
        return _count(run.rounds_done, "round")
    return f"{run.rounds_done} of {_count(run.rounds_planned, 'round')}"


def _facts(content: Content) -> list[str]:
    run = content.overview
    facts = [run.state.capitalize()]
    if not content.summary.get("versions"):
        facts.append(_rounds_words(content))
    if content.sites:
        facts.append(_count(len(content.sites), "site"))
    if run.seconds is not None and run.state in ("finished", "failed"):
        facts.append(duration(run.seconds))
    if run.started is not None:
        facts.append(f"started {moment(run.started)}")
    return facts


def _lead(content: Content) -> str:
    """The outcome in a few sentences."""
    federated = content.methods.get("federated", {}).get("accuracy")
    if versions := content.summary.get("versions"):
        return f"{_count(len(versions), 'model')} evaluated at {_count(len(content.sites), 'site')}."
    if federated is None:
        return _lead_so_far(content)
    words = [f"Federated training came to an accuracy of {percent(federated)} over all sites"]
    if content.zero_shot is not None:
        gain = federated - content.zero_shot
        words[0] += f", {points(abs(gain)).lstrip('+')} points {'above' if gain >= 0 else 'below'} zero-shot"
    words[0] += "."
    both = _pairs(content, "zero_shot", "federated")
    if len(both) > 1:
        better = sum(after > before for before, after in both)
        where = "every site" if better == len(both) else f"{better} of {len(both)} sites"
        words.append(f"It is above zero-shot at {where}.")
    everywhere = content.methods.get("local_only", {}).get("everywhere")
    if everywhere is not None:
        words.append(f"A model trained at one site alone reaches {percent(everywhere)} over all sites.")
    pooled = content.methods.get("pooled", {}).get("accuracy")
    if pooled:
        words.append(
            f"Training on all images in one place reaches {percent(pooled)}; federated comes to "
            f"{100 * federated / pooled:.0f}% of that."
        )
    return " ".join(words)


def _lead_so_far(content: Content) -> str:
    if not content.pooled:
        return "No round has been evaluated yet."
    first, last = min(content.pooled), max(content.pooled)
    if first == last:
        return f"Before training, accuracy over all sites is {percent(content.pooled[last])}."
    words = f"After {_count(last, 'round')}, accuracy over all sites is {percent(content.pooled[last])}"
    start = "before training" if first == 0 else f"after {_count(first, 'round')}"
    return f"{words}; {start} it was {percent(content.pooled[first])}."


def _pairs(content: Content, first: str, second: str) -> list[tuple[float, float]]:
    one, two = ((content.methods.get(name, {}).get("per_site") or {}) for name in (first, second))
    return [(one[s], two[s]) for s in content.sites if one.get(s) is not None and two.get(s) is not None]


def _numbers(content: Content) -> list[Fact]:
    run, upload = content.overview, content.summary.get("bytes_up_per_site_round")
    label = "federated accuracy, all sites" if run.state == "finished" else "federated accuracy so far"
    facts = []
    if run.federated_accuracy is not None:
        facts.append(Fact(what=label, value=percent(run.federated_accuracy)))
    if run.federated_accuracy is not None and content.zero_shot is not None:
        gain = points(run.federated_accuracy - content.zero_shot)
        facts.append(Fact(what="points against zero-shot", value=gain))
    if upload is None:
        sent = sum(line.sites for line in content.lines if line.bytes_up)
        upload = content.bytes_up / sent if sent else None
    if upload is not None:
        facts.append(Fact(what="one upload of one site", value=amount(upload)))
    if content.sigma_values:
        facts.append(Fact(what="trained values", value=f"{content.sigma_values:,}".replace(",", "\u202f")))
    return facts


def _methods_note(content: Content) -> str:
    missing = [METHODS[n].lower() for n in METHODS if n not in (*content.methods, "federated", "shared_only")]
    words = (
        "Accuracy is over the images of all sites; the other metrics are means of the sites' values. "
        "AUROC and F1 are means over the classes. Calibration error (expected) is better when lower."
    )
    if missing:
        words += f" Not part of this study: {', '.join(missing)}."
    return words


def _confusion_note(content: Content) -> str:
    known = (content.methods.get("federated", {}).get("confusion") or {}).get("metrics")
    if not known:
        return ""
    return (
        f"Of all these images together: balanced accuracy {percent(known.get('balanced_accuracy'))}, "
        f"F1 {decimal(known.get('f1'))}."
    )


def _no_results(content: Content) -> str:
    if content.overview.state == "failed":
        return "There are no results: the run failed before they were written."
    return "There are no results yet: they are written when the last round is finished."


def _sites_caption(content: Content) -> str:
    if not content.methods:
        return "Accuracy by site so far"
    bold = ", the best method of each site in bold" if len(content.methods) > 1 else ""
    return f"Accuracy on the test images of each site{bold}"


def _accuracy_caption(content: Content) -> str:
    many = len(content.accuracy) > figures.FEW
    words = "Accuracy on the test images of each site, after so many finished rounds."
    if many:
        words += " Thin lines are sites; the best and the worst at the end are named."
    return words + (" The strong line is all sites together." if len(content.accuracy) > 1 else "")


def _heat_caption(content: Content) -> str:
    tops = [float(np.nanmax(heat.values)) for heat in content.heats]
    return (
        "Mean absolute shift of the singular values, by part and layer; layer 0 is nearest the input. "
        f"The stronger the colour the larger the shift; the strongest is {max(tops, default=0.0):.2g}. "
        f"After round {content.sigma_round}."
    )


def _bytes_words(content: Content) -> str:
    return (
        f"In the whole run the sites sent {amount(content.bytes_up)} and received "
        f"{amount(content.bytes_down)}. Images, labels, file names and weights stayed where they were."
    )


def _bytes_caption(content: Content) -> str:
    words = "Bytes of coded sigma shifts by round, all sites together."
    last = content.lines[-1] if content.lines else None
    if last is not None and last.bytes_down and not last.bytes_up:
        words += f" Exchange {last.round} only evaluates the model of the last round."
    return words


def _study(content: Content) -> list[Fact]:
    study = content.study
    parts = ("sigma", "training", "federation", "data")
    sigma, training, federation, data = (_mapping(study.get(part)) for part in parts)
    facts = {
        "Backbone": study.get("backbone"),
        "Classes": study.get("classes"),
        "Prompt": study.get("template"),
        "Data": data.get("source"),
        "Shots": f"{study['shots']} for each class and site" if "shots" in study else None,
        "Adapted": _adapted(sigma),
        "Personal": _adapted(_mapping(study.get("personal"))),
        "Training": _phrase(
            (training.get("local_steps"), "local steps a round"),
            (training.get("batch_size"), "images a batch"),
            (training.get("learning_rate"), "learning rate"),
        ),
        "Federation": _phrase((federation.get("strategy"), ""), (federation.get("rounds"), "rounds")),
        "Privacy": _privacy(content),
        "Seed": study.get("seed"),
    }
    shown = {what: _text(value) for what, value in facts.items()}
    return [Fact(what=what, value=value) for what, value in shown.items() if value]


def _privacy(content: Content) -> str:
    asked = _mapping(content.study.get("privacy"))
    if asked.get("level", "none") == "none":
        return ""
    told = "" if content.epsilon is None else f"; epsilon {content.epsilon:.2f} was spent"
    return (
        f"differential, hides each {asked['level']}: noise multiplier {asked['noise_multiplier']:g},"
        f" clipping norm {asked['clip_norm']:g}, delta {asked['delta']:g}{told}, of {asked['epsilon']:g}"
    )


def _adapted(sigma: dict[str, Any]) -> str:
    pieces = (("towers", "towers"), ("layers", "layers"), ("parts", "parts"))
    return "; ".join(f"{word}: {_text(sigma[key])}" for key, word in pieces if sigma.get(key))


def _phrase(*pieces: tuple[Any, str]) -> str:
    return ", ".join(f"{value} {words}".strip() for value, words in pieces if value is not None)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)
