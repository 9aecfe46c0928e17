"""The tables of a report, as text in rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import (
    METHODS,
    NOTHING,
    format_bytes,
    format_decimal,
    format_percent,
    format_points,
)
from fedsigma.server.runs.shift_magnitude import ShiftMagnitude

__all__ = [
    "Grid",
    "Row",
    "confusion_grid",
    "explanation_grid",
    "explanation_grids",
    "heat_grid",
    "methods_grid",
    "notices_grid",
    "rounds_grid",
    "sites_grid",
    "versions_grid",
]

MOST_NOTICES = 60


@dataclass(frozen=True, kw_only=True)
class Row:
    """A table row: its heading, what stands beneath it in small, its cells, and which of them are best."""

    name: str
    cells: Sequence[str]
    note: str = ""
    kind: str = ""
    best: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table. `texts` are the columns set to the left; the first column is the rows' headings."""

    heads: Sequence[str] = ()
    rows: Sequence[Row] = ()
    texts: frozenset[int] = frozenset({0})
    even: bool = False  # columns of numbers of one width


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "accuracy": ("Accuracy", format_percent),
    "balanced_accuracy": ("Balanced accuracy", format_percent),
    "auroc": ("AUROC", format_decimal),
    "f1": ("F1", format_decimal),
    "ece": ("Calibration error", format_decimal),
}

_ABOUT = {
    "zero_shot": "the backbone as it came",
    "local_only": "each site alone, judged at home",
    "shared_only": "the federated model without the sites' own values",
    "federated": "only sigma shifts leave the sites",
    "pooled": "all images in one place",
}


def methods_grid(content: ReportData) -> Grid:
    """A row per method, a column per metric."""
    values = {}
    for name, entry in content.methods.items():
        values[name] = {**(entry.get("metrics") or {}), "accuracy": entry.get("accuracy")}
    shown = [column for column in _COLUMNS if any(v.get(column) is not None for v in values.values())]
    rows = []
    for name, entry in content.methods.items():
        cells = [_COLUMNS[column][1](values[name].get(column)) for column in shown]
        rows.append(Row(name=METHODS[name], note=_ABOUT[name], cells=cells, kind=name))
        if name == "local_only" and entry.get("everywhere") is not None:
            cells = [
                format_percent(entry["everywhere"]) if column == "accuracy" else NOTHING for column in shown
            ]
            rows.append(Row(name=METHODS[name], note="each site alone, judged at all sites", cells=cells))
    return Grid(heads=["Method", *(_COLUMNS[column][0] for column in shown)], rows=rows, even=True)


def confusion_grid(content: ReportData) -> Grid:
    """The federated model's test images of all sites: a row per true class, a column per judgement.

    Empty unless every site tells its counts.
    """
    classes = content.summary.get("classes") or []
    matrix = (content.methods.get("federated", {}).get("confusion") or {}).get("all_sites") or []
    rows = []
    for number, (name, counts) in enumerate(zip(classes, matrix, strict=False)):
        recall = counts[number] / sum(counts) if sum(counts) else None
        cells = [*(str(count) for count in counts), str(sum(counts)), format_percent(recall)]
        rows.append(Row(name=name, cells=cells, best=frozenset({number})))
    return Grid(heads=["True class", *classes, "Images", "Found"], rows=rows, even=True)


def versions_grid(content: ReportData) -> Grid:
    """A row per version, a column per site, and how even it is; empty unless versions were evaluated."""
    versions = content.summary.get("versions") or {}
    rows = []
    for name, entry in versions.items():
        shares, fair = entry.get("per_site") or {}, entry.get("fairness") or {}
        worst = fair.get("worst") or {}
        cells = [
            format_percent(entry.get("accuracy")),
            *(format_percent(shares.get(site)) for site in content.sites),
        ]
        cells += [format_percent(worst.get("accuracy")), format_points(fair["spread"]) if fair else NOTHING]
        note = f"worst at {worst['site']}" if worst else ""
        rows.append(Row(name=METHODS.get(name, name), note=note, cells=cells))
    heads = ["Version", "All sites", *content.sites, "Worst site", "Spread"]
    return Grid(heads=heads, rows=rows, even=True)


def sites_grid(content: ReportData) -> Grid:
    """A row per site, a column per method; while there are no results, how far each site has come."""
    if not content.methods:
        return _sites_so_far(content)
    shares = {name: entry.get("per_site") or {} for name, entry in content.methods.items()}
    elsewhere = content.methods.get("local_only", {}).get("everywhere_per_site") or {}
    zero, federated = shares.get("zero_shot", {}), shares.get("federated", {})
    rows = []
    for site in content.sites:
        values = [share.get(site) for share in shares.values()]
        known = [value for value in values if value is not None]
        best = frozenset(i for i, value in enumerate(values) if len(known) > 1 and value == max(known))
        cells = [format_percent(value) for value in values]
        if zero and federated:
            both = zero.get(site) is not None and federated.get(site) is not None
            cells.append(format_points(federated[site] - zero[site]) if both else NOTHING)
        if elsewhere:
            cells.append(format_percent(elsewhere.get(site)))
        rows.append(Row(name=site, cells=cells, best=best))
    heads = ["Site", *(METHODS[name] for name in shares)]
    heads += ["Federated less zero-shot"] if zero and federated else []
    heads += ["Its own model at all sites"] if elsewhere else []
    return Grid(heads=heads, rows=rows, even=True)


def _sites_so_far(content: ReportData) -> Grid:
    rows = []
    for site in content.sites:
        values = content.accuracy.get(site, {})
        first, last = (values[min(values)], values[max(values)]) if values else (None, None)
        change = format_points(last - first) if last is not None and first is not None else NOTHING
        rows.append(Row(name=site, cells=[format_percent(first), format_percent(last), change]))
    return Grid(heads=["Site", "First round", "Newest round", "Points"], rows=rows, even=True)


def rounds_grid(content: ReportData) -> Grid:
    """A row per round over all its sites."""
    rows = []
    for line in content.lines:
        cells = [
            format_percent(line.pooled),
            format_percent(line.lowest),
            format_percent(line.highest),
            str(line.sites),
        ]
        rows.append(
            Row(
                name=str(line.round),
                cells=[*cells, format_bytes(line.bytes_up), format_bytes(line.bytes_down)],
            )
        )
    heads = ["Round", "All sites", "Lowest", "Highest", "Sites", "From sites", "To sites"]
    return Grid(heads=heads, rows=rows, even=True)


def explanation_grid(explained: Sequence[dict[str, Any]]) -> Grid:
    """A row per head that changed much: what it writes more and less of; empty where none was explained."""
    rows = []
    for one in explained:
        name = f"{one['tower']} tower, layer {one['layer'] + 1}, head {one['head'] + 1}"
        told = [", ".join(w["phrase"] for w in one[key]) or NOTHING for key in ("gained", "lost")]
        rows.append(Row(name=name, cells=[format_percent(one["share"]), *told]))
    return Grid(heads=["Head", "Of the change", "More of", "Less of"], rows=rows, texts=frozenset({0, 2, 3}))


def explanation_grids(content: ReportData) -> list[dict[str, Any]]:
    """What the last shift of each site that allows it changed: `site` and `grid`."""
    told = content.summary.get("explanation_by_site") or {}
    return [{"site": site, "grid": explanation_grid(rows)} for site, rows in told.items()]


def heat_grid(heat: ShiftMagnitude) -> Grid:
    """A row per part, a column per layer, in thousandths."""
    rows = [
        Row(name=part, cells=[NOTHING if v != v else f"{1000 * v:.1f}" for v in values])
        for part, values in zip(heat.parts, heat.values.tolist(), strict=True)
    ]
    return Grid(heads=["Part", *(str(layer) for layer in heat.layers)], rows=rows)


def notices_grid(content: ReportData) -> Grid:
    """A row per thing that went otherwise than planned, at most `MOST_NOTICES` of them."""
    rows = []
    for notice in content.notices[:MOST_NOTICES]:
        times = f"{notice.count} times" if notice.count > 1 else "once"
        cells = [notice.what, notice.reason or NOTHING, notice.rounds or NOTHING, times]
        rows.append(Row(name=notice.site or "the run", cells=cells))
    heads = ["Site", "What", "Reason", "Rounds", "How often"]
    return Grid(heads=heads, rows=rows, texts=frozenset({0, 1, 2, 3}))
