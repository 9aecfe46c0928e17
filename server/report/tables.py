"""The tables of a report, as text in rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import (
    METHODS,
    MISSING,
    format_bytes,
    format_decimal,
    format_percent,
    format_points,
    format_ranges,
)
from fedsigma.server.report.summary_text import gains_over_zero_shot
from fedsigma.server.runs.shift_magnitude import ShiftMagnitude

__all__ = [
    "Grid",
    "Row",
    "confusion_grid",
    "explanation_grid",
    "explanation_grids",
    "methods_grid",
    "notices_grid",
    "rounds_grid",
    "shift_magnitude_grid",
    "sites_grid",
    "versions_grid",
]

MAX_NOTICES = 60


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        name: Heading of the row.
        cells: Texts of the other columns.
        note: Small text below the heading.
        kind: CSS class of the row.
        best: Indices into `cells` that are shown in bold.
    """

    name: str
    cells: Sequence[str]
    note: str = ""
    kind: str = ""
    best: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; its first column has the rows' headings.

    Attributes:
        header: Headings of the columns.
        rows: The rows.
        text_columns: Indices of left-aligned columns; the others have numbers.
        equal_columns: Whether all columns have the same width.
    """

    header: Sequence[str] = ()
    rows: Sequence[Row] = ()
    text_columns: frozenset[int] = frozenset({0})
    equal_columns: bool = False


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "accuracy": ("Accuracy", format_percent),
    "balanced_accuracy": ("Balanced accuracy", format_percent),
    "auroc": ("AUROC", format_decimal),
    "f1": ("F1", format_decimal),
    "ece": ("Calibration error", format_decimal),
}

_DESCRIPTIONS = {
    "zero_shot": "the unadapted backbone",
    "local_only": "each site trains alone, evaluated at that site",
    "shared_only": "the federated model without the sites' personal values",
    "federated": "sites share only sigma shifts",
    "pooled": "trained on all images in one place",
}


def methods_grid(data: ReportData) -> Grid:
    """Return a row per method with a column per metric."""
    metrics = {
        name: {**(entry.get("metrics") or {}), "accuracy": entry.get("accuracy")}
        for name, entry in data.methods.items()
    }
    columns = [name for name in _COLUMNS if any(m.get(name) is not None for m in metrics.values())]
    rows = []
    for method, entry in data.methods.items():
        cells = [_COLUMNS[name][1](metrics[method].get(name)) for name in columns]
        rows.append(Row(name=METHODS[method], note=_DESCRIPTIONS[method], cells=cells, kind=method))
        if method == "local_only" and entry.get("everywhere") is not None:
            everywhere = format_percent(entry["everywhere"])
            cells = [everywhere if name == "accuracy" else MISSING for name in columns]
            note = "each site trains alone, evaluated at all sites"
            rows.append(Row(name=METHODS[method], note=note, cells=cells))
    header = ["Method", *(_COLUMNS[name][0] for name in columns)]
    return Grid(header=header, rows=rows, equal_columns=True)


def confusion_grid(data: ReportData) -> Grid:
    """Return the federated model's confusion matrix over all sites; empty unless every site shares it."""
    classes = data.summary.get("classes") or []
    matrix = (data.methods.get("federated", {}).get("confusion") or {}).get("all_sites") or []
    rows = []
    for index, (name, counts) in enumerate(zip(classes, matrix, strict=False)):
        recall = counts[index] / sum(counts) if sum(counts) else None
        cells = [*(str(count) for count in counts), str(sum(counts)), format_percent(recall)]
        rows.append(Row(name=name, cells=cells, best=frozenset({index})))
    return Grid(header=["True class", *classes, "Images", "Recall"], rows=rows, equal_columns=True)


def versions_grid(data: ReportData) -> Grid:
    """Return a row per model version with a column per site; empty unless versions were evaluated."""
    versions = data.summary.get("versions") or {}
    rows = []
    for name, entry in versions.items():
        per_site, fairness = entry.get("per_site") or {}, entry.get("fairness") or {}
        worst = fairness.get("worst") or {}
        cells = [format_percent(entry.get("accuracy"))]
        cells += [format_percent(per_site.get(site)) for site in data.sites]
        cells.append(format_percent(worst.get("accuracy")))
        cells.append(format_points(fairness["spread"]) if fairness else MISSING)
        note = f"worst at {worst['site']}" if worst else ""
        rows.append(Row(name=METHODS.get(name, name), note=note, cells=cells))
    header = ["Version", "All sites", *data.sites, "Worst site", "Spread"]
    return Grid(header=header, rows=rows, equal_columns=True)


def sites_grid(data: ReportData) -> Grid:
    """Return a row per site with a column per method; before there are results, the accuracy so far."""
    if not data.methods:
        return _accuracy_so_far(data)
    per_method = {name: entry.get("per_site") or {} for name, entry in data.methods.items()}
    everywhere = data.methods.get("local_only", {}).get("everywhere_per_site") or {}
    compared = per_method.get("zero_shot") and per_method.get("federated")
    gains, rows = gains_over_zero_shot(data), []
    for site in data.sites:
        values = [per_site.get(site) for per_site in per_method.values()]
        numbers = [value for value in values if value is not None]
        best = frozenset(i for i, value in enumerate(values) if len(numbers) > 1 and value == max(numbers))
        cells = [format_percent(value) for value in values]
        if compared:
            cells.append(format_points(gains.get(site)))
        if everywhere:
            cells.append(format_percent(everywhere.get(site)))
        rows.append(Row(name=site, cells=cells, best=best))
    header = ["Site", *(METHODS[name] for name in per_method)]
    header += ["Federated minus zero-shot"] if compared else []
    header += ["Local model at all sites"] if everywhere else []
    return Grid(header=header, rows=rows, equal_columns=True)


def _accuracy_so_far(data: ReportData) -> Grid:
    rows = []
    for site in data.sites:
        values = data.accuracy.get(site, {})
        first, last = (values[min(values)], values[max(values)]) if values else (None, None)
        gain = last - first if last is not None and first is not None else None
        cells = [format_percent(first), format_percent(last), format_points(gain)]
        rows.append(Row(name=site, cells=cells))
    return Grid(header=["Site", "First round", "Latest round", "Points"], rows=rows, equal_columns=True)


def rounds_grid(data: ReportData) -> Grid:
    """Return a row per round over all its sites."""
    rows = []
    for row in data.rounds:
        cells = [format_percent(accuracy) for accuracy in (row.all_sites, row.lowest, row.highest)]
        cells += [str(row.accepted), format_bytes(row.bytes_up), format_bytes(row.bytes_down)]
        rows.append(Row(name=str(row.round), cells=cells))
    header = ["Round", "All sites", "Lowest", "Highest", "Sites", "From sites", "To sites"]
    return Grid(header=header, rows=rows, equal_columns=True)


def explanation_grid(heads: Sequence[dict[str, Any]]) -> Grid:
    """Return a row per attention head in `explanation` of summary.json: what it writes more and less of."""
    rows = []
    for head in heads:
        name = f"{head['tower']} tower, layer {head['layer'] + 1}, head {head['head'] + 1}"
        phrases = [", ".join(entry["phrase"] for entry in head[key]) or MISSING for key in ("gained", "lost")]
        rows.append(Row(name=name, cells=[format_percent(head["share"]), *phrases]))
    header = ["Head", "Share of the change", "More of", "Less of"]
    return Grid(header=header, rows=rows, text_columns=frozenset({0, 2, 3}))


def explanation_grids(data: ReportData) -> list[dict[str, Any]]:
    """Return `site` and `grid` for each site that allows the explanation of its last shift."""
    by_site = data.summary.get("explanation_by_site") or {}
    return [{"site": site, "grid": explanation_grid(heads)} for site, heads in by_site.items()]


def shift_magnitude_grid(magnitude: ShiftMagnitude) -> Grid:
    """Return a row per part with a column per layer, in thousandths."""
    rows = [
        Row(name=part, cells=[MISSING if v != v else f"{1000 * v:.1f}" for v in values])
        for part, values in zip(magnitude.parts, magnitude.values.tolist(), strict=True)
    ]
    return Grid(header=["Part", *(str(layer) for layer in magnitude.layers)], rows=rows)


def notices_grid(data: ReportData) -> Grid:
    """Return a row per problem during the run, at most `MAX_NOTICES`."""
    rows = []
    for (label, site, reason), numbers in islice(data.notices.items(), MAX_NOTICES):
        rounds = format_ranges(number for number in numbers if number)
        times = f"{len(numbers)} times" if len(numbers) > 1 else "once"
        cells = [label, reason or MISSING, rounds or MISSING, times]
        rows.append(Row(name=site or "the run", cells=cells))
    header = ["Site", "What", "Reason", "Rounds", "How often"]
    return Grid(header=header, rows=rows, text_columns=frozenset({0, 1, 2, 3}))
