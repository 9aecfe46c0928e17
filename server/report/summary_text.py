"""What the report and the dashboard say of a run in sentences and single facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import format_percent, format_points

__all__ = ["LabelledValue", "counted", "headline", "pairs", "study_facts"]


@dataclass(frozen=True, kw_only=True)
class LabelledValue:
    """A value with its name."""

    what: str
    value: str


def counted(number: int, noun: str) -> str:
    """1 round, 2 rounds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def headline(content: ReportData) -> str:
    """The outcome in a few sentences."""
    federated = content.methods.get("federated", {}).get("accuracy")
    if versions := content.summary.get("versions"):
        return f"{counted(len(versions), 'model')} evaluated at {counted(len(content.sites), 'site')}."
    if federated is None:
        return _lead_so_far(content)
    words = [f"Federated training came to an accuracy of {format_percent(federated)} over all sites"]
    if content.zero_shot is not None:
        gain = federated - content.zero_shot
        words[0] += (
            f", {format_points(abs(gain)).lstrip('+')} points {'above' if gain >= 0 else 'below'} zero-shot"
        )
    words[0] += "."
    both = pairs(content, "zero_shot", "federated")
    if len(both) > 1:
        better = sum(after > before for before, after in both)
        where = "every site" if better == len(both) else f"{better} of {len(both)} sites"
        words.append(f"It is above zero-shot at {where}.")
    everywhere = content.methods.get("local_only", {}).get("everywhere")
    if everywhere is not None:
        words.append(
            f"A model trained at one site alone reaches {format_percent(everywhere)} over all sites."
        )
    pooled = content.methods.get("pooled", {}).get("accuracy")
    if pooled:
        words.append(
            f"Training on all images in one place reaches {format_percent(pooled)}; federated comes to "
            f"{100 * federated / pooled:.0f}% of that."
        )
    return " ".join(words)


def _lead_so_far(content: ReportData) -> str:
    if not content.pooled:
        return "No round has been evaluated yet."
    first, last = min(content.pooled), max(content.pooled)
    if first == last:
        return f"Before training, accuracy over all sites is {format_percent(content.pooled[last])}."
    words = (
        f"After {counted(last, 'round')}, accuracy over all sites is {format_percent(content.pooled[last])}"
    )
    start = "before training" if first == 0 else f"after {counted(first, 'round')}"
    return f"{words}; {start} it was {format_percent(content.pooled[first])}."


def pairs(content: ReportData, first: str, second: str) -> list[tuple[float, float]]:
    """The accuracies of two methods at each site that has both."""
    one, two = ((content.methods.get(name, {}).get("per_site") or {}) for name in (first, second))
    return [(one[s], two[s]) for s in content.sites if one.get(s) is not None and two.get(s) is not None]


def study_facts(content: ReportData) -> list[LabelledValue]:
    """The settings of the study that a reader asks for first."""
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
    return [LabelledValue(what=what, value=value) for what, value in shown.items() if value]


def _privacy(content: ReportData) -> str:
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
