"""The sentences and labelled values that the report and the dashboard show about a run."""

from __future__ import annotations

from typing import Any

from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import format_percent, format_points

__all__ = [
    "count_noun",
    "gains_over_zero_shot",
    "headline",
    "points_over_zero_shot",
    "study_settings",
]


def count_noun(number: int, noun: str) -> str:
    """Return `1 round` or `2 rounds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def headline(data: ReportData) -> str:
    """Return the outcome of a run in a few sentences."""
    federated = data.methods.get("federated", {}).get("accuracy")
    if versions := data.summary.get("versions"):
        return f"{count_noun(len(versions), 'model')} evaluated at {count_noun(len(data.sites), 'site')}."
    if federated is None:
        return _progress_so_far(data)
    sentences = [f"Federated training reached an accuracy of {format_percent(federated)} over all sites"]
    if data.zero_shot is not None:
        gain = federated - data.zero_shot
        points = format_points(abs(gain)).lstrip("+")
        sentences[0] += f", {points} points {'above' if gain >= 0 else 'below'} zero-shot"
    sentences[0] += "."
    gains = gains_over_zero_shot(data)
    if len(gains) > 1:
        better = sum(gain > 0 for gain in gains.values())
        where = "every site" if better == len(gains) else f"{better} of {len(gains)} sites"
        sentences.append(f"It is above zero-shot at {where}.")
    everywhere = data.methods.get("local_only", {}).get("everywhere")
    if everywhere is not None:
        sentences.append(
            f"A model trained at one site alone reaches {format_percent(everywhere)} over all sites."
        )
    if pooled := data.methods.get("pooled", {}).get("accuracy"):
        sentences.append(
            f"Training on all images in one place reaches {format_percent(pooled)}; federated training"
            f" reaches {100 * federated / pooled:.0f}% of that accuracy."
        )
    return " ".join(sentences)


def _progress_so_far(data: ReportData) -> str:
    accuracy = data.accuracy_all_sites
    if not accuracy:
        return "No round has been evaluated yet."
    first, last = min(accuracy), max(accuracy)
    newest = format_percent(accuracy[last])
    if first == last:
        return f"Before training, accuracy over all sites is {newest}."
    start = "before training" if first == 0 else f"after {count_noun(first, 'round')}"
    return (
        f"After {count_noun(last, 'round')}, accuracy over all sites is {newest};"
        f" {start} it was {format_percent(accuracy[first])}."
    )


def gains_over_zero_shot(data: ReportData) -> dict[str, float]:
    """Return federated minus zero-shot accuracy, as a fraction, of each site that has both."""
    before, after = (data.methods.get(name, {}).get("per_site") or {} for name in ("zero_shot", "federated"))
    return {
        site: after[site] - before[site]
        for site in data.sites
        if before.get(site) is not None and after.get(site) is not None
    }


def points_over_zero_shot(data: ReportData) -> dict[str, str]:
    """Return how far the federated accuracy is above zero-shot, by its label; empty unless both are known."""
    if data.run.federated_accuracy is None or data.zero_shot is None:
        return {}
    return {"points over zero-shot": format_points(data.run.federated_accuracy - data.zero_shot)}


def study_settings(data: ReportData) -> dict[str, str]:
    """Return the most important settings of the study by label."""
    study = data.study
    sections = ("sigma", "training", "federation", "data")
    sigma, training, federation, source = (_mapping(study.get(name)) for name in sections)
    settings = {
        "Backbone": study.get("backbone"),
        "Classes": study.get("classes"),
        "Prompt": study.get("template"),
        "Data": source.get("source"),
        "Shots": f"{study['shots']} per class and site" if "shots" in study else None,
        "Adapted": _adapted(sigma),
        "Personal": _adapted(_mapping(study.get("personal"))),
        "Training": _phrase(
            (training.get("local_steps"), "local steps per round"),
            (training.get("batch_size"), "images per batch"),
            (training.get("learning_rate"), "learning rate"),
        ),
        "Federation": _phrase((federation.get("strategy"), ""), (federation.get("rounds"), "rounds")),
        "Privacy": _privacy(data),
        "Seed": study.get("seed"),
    }
    return {label: text for label, value in settings.items() if (text := _text(value))}


def _privacy(data: ReportData) -> str:
    privacy = _mapping(data.study.get("privacy"))
    if privacy.get("level", "none") == "none":
        return ""
    spent = "" if data.epsilon is None else f"{data.epsilon:.2f} spent of "
    return (
        f"differential privacy for each {privacy['level']}: noise multiplier {privacy['noise_multiplier']:g},"
        f" clipping norm {privacy['clip_norm']:g}, delta {privacy['delta']:g},"
        f" epsilon {spent}{privacy['epsilon']:g}"
    )


def _adapted(sigma: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {_text(sigma[key])}" for key in ("towers", "layers", "parts") if sigma.get(key))


def _phrase(*pieces: tuple[Any, str]) -> str:
    return ", ".join(f"{value} {noun}".strip() for value, noun in pieces if value is not None)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)
