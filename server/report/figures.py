"""The figures of a report: SVG drawn by matplotlib, or an empty string without values to draw.

Each figure is drawn with placeholder colours and saved as SVG that keeps text as text. For use inside an
HTML page, the placeholders are replaced by CSS variables (so that one figure serves light, dark and print),
ids are made unique, and external references are removed.
"""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedsigma.server.report.data import ReportData
from fedsigma.server.report.formatting import METHODS, format_bytes, format_percent, truncate

__all__ = ["accuracy_figure", "bytes_figure", "shift_magnitude_figure", "sites_figure"]

WIDTH = 9.0
"""Width of a figure in inches; the page scales it to its own width."""
MAX_NAMED_SITES = 8
"""Up to so many sites each have a colour, and a name at the end of the line."""

_TONES = ("ink", "muted", "rule", "accent", "ochre", "violet", "paper")
_INK, _MUTED, _RULE, _ACCENT, _OCHRE, _VIOLET, _PAPER = (f"#0a0b{i:02x}" for i in range(len(_TONES)))
_SERIES = tuple(f"#0a0c{i:02x}" for i in range(MAX_NAMED_SITES))
_VARIABLES = {f"#0a0b{i:02x}": f"var(--{tone})" for i, tone in enumerate(_TONES)}
_VARIABLES |= {colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsigma",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def accuracy_figure(data: ReportData) -> str:
    """Draw accuracy over the finished rounds: a line per site, one for all sites, and the zero-shot level."""
    series = {site: data.accuracy[site] for site in data.sites if site in data.accuracy}
    if not series and not data.accuracy_all_sites:
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.9)
        few = len(series) <= MAX_NAMED_SITES
        ends: list[tuple[float, float, str, str]] = []
        for index, (site, values) in enumerate(series.items()):
            colour = _SERIES[index] if few else _MUTED
            _line(axes, values, colour, 1.3 if few else 0.7, 0.9 if few else 0.4, f"site-{index}")
            if few:
                ends.append((*_end(values), truncate(site, 24), colour))
        if data.accuracy_all_sites and len(series) != 1:
            _line(axes, data.accuracy_all_sites, _INK, 2.4, 1.0, "all-sites")
            ends.append((*_end(data.accuracy_all_sites), "All sites", _INK))
        if not few:
            ends += _extremes(series)
        _rounds_axis(axes, [*series.values(), data.accuracy_all_sites])
        if data.zero_shot is not None:
            _zero_shot_level(axes, data.zero_shot)
        _label_ends(axes, ends)
        titles = {f"site-{index}": site for index, site in enumerate(series)} | {"all-sites": "All sites"}
        return _svg(figure, "accuracy", _describe_accuracy(data, len(series)), titles)


def sites_figure(data: ReportData) -> str:
    """Draw the accuracy of each method at each site, with a bar from zero-shot to federated."""
    per_site = {name: entry.get("per_site") or {} for name, entry in data.methods.items()}
    sites = [site for site in data.sites if any(site in values for values in per_site.values())]
    methods = {
        name: {site: value for site, value in per_site.get(name, {}).items() if value is not None}
        for name in _MARKS
    }
    if not sites:
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1.1 + (0.36 if len(sites) <= 20 else 0.23) * len(sites))
        for row, site in enumerate(sites):
            if site in methods["zero_shot"] and site in methods["federated"]:
                ends = [methods["zero_shot"][site], methods["federated"][site]]
                axes.plot(ends, [row, row], color=_ACCENT, alpha=0.35, linewidth=3)
        for name, marks in _MARKS.items():
            rows = [row for row, site in enumerate(sites) if site in methods[name]]
            if rows:
                x = [methods[name][sites[row]] for row in rows]
                axes.plot(x, rows, linestyle="none", label=METHODS[name], **marks)
        axes.set_yticks(range(len(sites)), [truncate(site, 30) for site in sites])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="x")
        handles = max(1, len(axes.get_legend_handles_labels()[0]))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=handles, handletextpad=0.3)
        return _svg(figure, "sites", _describe_sites(methods, sites), {})


def shift_magnitude_figure(data: ReportData) -> str:
    """Draw the mean absolute shift by part and layer: one heat map per tower, with a common colour scale."""
    if not data.shift_magnitudes:
        return ""
    maximum = max((float(np.nanmax(m.values)) for m in data.shift_magnitudes), default=0.0) or 1.0
    with mpl.rc_context(_STYLE):
        height = 0.5 + sum(0.3 * len(m.parts) + 0.75 for m in data.shift_magnitudes)
        figure = Figure(figsize=(WIDTH, height))
        figure.set_layout_engine("constrained", hspace=0.12)
        ratios = [len(m.parts) for m in data.shift_magnitudes]
        grid = figure.subplots(len(data.shift_magnitudes), 1, squeeze=False, height_ratios=ratios)
        titles: dict[str, str] = {}
        widest = max(len(m.layers) for m in data.shift_magnitudes)
        for index, (axes, magnitude) in enumerate(zip(grid[:, 0], data.shift_magnitudes, strict=True)):
            for (row, column), value in np.ndenumerate(magnitude.values):
                name = f"cell-{index}-{row}-{column}"
                cell = FancyBboxPatch(
                    (column - 0.46, row - 0.44), 0.92, 0.88, boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor=_ACCENT, edgecolor="none", gid=name,
                    alpha=0.0 if np.isnan(value) else 0.06 + 0.94 * float(value) / maximum,
                )  # fmt: skip
                axes.add_patch(cell)
                layer, part = magnitude.layers[column], magnitude.parts[row]
                titles[name] = f"{magnitude.tower}, layer {layer}, {part}: {value:.2g}"
            axes.set_xlim(-0.6, widest - 0.4)
            axes.set_ylim(len(magnitude.parts) - 0.4, -0.6)
            step = max(1, round(len(magnitude.layers) / 24))
            axes.set_xticks(range(0, len(magnitude.layers), step), [str(n) for n in magnitude.layers[::step]])
            axes.set_yticks(range(len(magnitude.parts)), magnitude.parts)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(
                f"{magnitude.tower.capitalize()} tower, by layer", loc="left", fontsize=10, color=_INK
            )
        return _svg(figure, "shift", _describe_shift(data), titles)


def bytes_figure(data: ReportData) -> str:
    """Draw the bytes sent and received by round, summed over all sites."""
    lines = [line for line in data.rounds if line.bytes_up or line.bytes_down]
    if not lines:
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(2.7)
        rounds = np.array([line.round for line in lines])
        up = np.array([line.bytes_up for line in lines], dtype=float)
        down = np.array([line.bytes_down for line in lines], dtype=float)
        width = 0.38 if len(lines) <= 60 else 0.5
        axes.bar(rounds - width / 2, up, width, color=_ACCENT, label="from the sites")
        axes.bar(rounds + width / 2, down, width, color=_MUTED, alpha=0.55, label="to the sites")
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: format_bytes(value).replace(".0 ", " "))
        )
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        if len(lines) <= 12:
            axes.set_xticks(rounds)
        # Leave room for a few rounds, so that a single one does not fill the figure.
        axes.set_xlim(rounds.min() - 0.8, max(rounds.max(), rounds.min() + 7) + 0.8)
        axes.grid(axis="y")
        axes.set_xlabel("Round")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, handlelength=1, handletextpad=0.5)
        description = (
            f"Bar chart of bytes by round. Over {len(lines)} rounds the sites sent "
            f"{format_bytes(data.bytes_up)} and received {format_bytes(data.bytes_down)} in total."
        )
        return _svg(figure, "bytes", description, {})


_MARKS: dict[str, dict[str, Any]] = {
    "zero_shot": {"marker": "o", "markersize": 7, "markerfacecolor": _PAPER, "markeredgecolor": _MUTED,
                  "markeredgewidth": 1.6},
    "local_only": {"marker": "D", "markersize": 6, "color": _OCHRE},
    "pooled": {"marker": "s", "markersize": 6.5, "color": _VIOLET},
    "shared_only": {"marker": "o", "markersize": 6.5, "markerfacecolor": _PAPER, "markeredgecolor": _ACCENT,
                    "markeredgewidth": 1.6},
    "federated": {"marker": "o", "markersize": 9, "color": _ACCENT},
}  # fmt: skip


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _line(axes: Axes, values: dict[int, float], colour: str, width: float, alpha: float, gid: str) -> None:
    rounds, accuracies = zip(*sorted(values.items()), strict=True)
    dots = {"marker": "o" if len(rounds) <= 12 else "", "markersize": 2.2 * width**0.5}
    axes.plot(rounds, accuracies, color=colour, linewidth=width, alpha=alpha, gid=gid, **dots)


def _end(values: dict[int, float]) -> tuple[float, float]:
    last = max(values)
    return float(last), values[last]


def _extremes(series: dict[str, dict[int, float]]) -> list[tuple[float, float, str, str]]:
    """Return labels for the best and the worst of many sites."""
    order = sorted(series, key=lambda site: (_end(series[site])[1], site))
    return [(*_end(series[site]), truncate(site, 24), _MUTED) for site in (order[0], order[-1])]


def _rounds_axis(axes: Axes, lines: list[dict[int, float]]) -> None:
    accuracies = [value for line in lines for value in line.values()]
    last = max(max(line) for line in lines if line)
    margin = max(0.03, 0.06 * (max(accuracies) - min(accuracies)))
    axes.set_ylim(max(0.0, min(accuracies) - margin), min(1.0, max(accuracies) + margin))
    axes.set_xlim(-0.01 * max(last, 1), max(last, 1) * 1.005)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    axes.set_xlabel("Finished rounds")


def _zero_shot_level(axes: Axes, level: float) -> None:
    axes.axhline(level, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        "zero-shot", (0.995, level), xycoords=("axes fraction", "data"), xytext=(0, -3),
        textcoords="offset points", ha="right", va="top", color=_MUTED, fontsize=9,
    )  # fmt: skip


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Place names at the right ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) / 19
    right = max((x for x, *_ in ends), default=0.0)
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, *_ in ordered:
        heights.append(max(y, heights[-1] + gap if heights else low))
    # Labels that were pushed above the axes are moved down, from the top.
    limit = high
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - gap
    for (_, _, text, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text, (right, height), xytext=(7, 0), textcoords="offset points", va="center",
            color=colour, fontsize=9.5, annotation_clip=False,
        )  # fmt: skip


def _describe_accuracy(data: ReportData, sites: int) -> str:
    text = f"Line chart of accuracy by finished rounds for {sites} site{'s' if sites != 1 else ''}."
    if all_sites := data.accuracy_all_sites:
        first, last = min(all_sites), max(all_sites)
        start, end = format_percent(all_sites[first]), format_percent(all_sites[last])
        begin = "before training" if first == 0 else f"after {first} rounds"
        text += f" Over all sites it is {start} {begin} and {end} after {last} rounds."
    final = [_end(values)[1] for values in data.accuracy.values()]
    if len(final) > 1:
        lowest, highest = format_percent(min(final)), format_percent(max(final))
        text += f" At the end the sites are between {lowest} and {highest}."
    if data.zero_shot is not None:
        text += f" A dashed level marks zero-shot at {format_percent(data.zero_shot)}."
    return text


def _describe_sites(methods: dict[str, dict[str, float]], sites: list[str]) -> str:
    text = f"Dot chart of accuracy by site and method for {len(sites)} site{'s' if len(sites) != 1 else ''}."
    before, after = methods["zero_shot"], methods["federated"]
    if complete := before.keys() & after.keys() & set(sites):
        better = sum(after[site] > before[site] for site in complete)
        text += f" Federated is above zero-shot at {better} of {len(complete)}."
    return text + " The table of sites has the numbers."


def _describe_shift(data: ReportData) -> str:
    text = "Heat map of the mean absolute sigma shift by part and layer."
    for magnitude in data.shift_magnitudes:
        row, column = np.unravel_index(int(np.nanargmax(magnitude.values)), magnitude.values.shape)
        where = f"{magnitude.parts[row]} of layer {magnitude.layers[column]}"
        text += f" The {magnitude.tower} tower moved most in {where}, by {magnitude.values[row, column]:.2g}."
    return text


def _svg(figure: Figure, name: str, description: str, titles: dict[str, str]) -> str:
    """Return the figure as an `<svg>` element; ids begin with the name, `titles` are hover texts by id."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Site names may have glyphs that matplotlib's font lacks; the page's fonts have them.
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    match = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)</svg>', svg, re.DOTALL)
    assert match is not None
    view, inner = match.groups()
    # Only inside tags: a site name may look like a colour or an id. (A `>` in text is an entity.)
    inner = re.sub(r"<[^>]*>", lambda match: _restyle(match.group(0), name), inner)
    for gid, title in titles.items():
        mark = f'<g id="{name}-{gid}">'
        inner = inner.replace(mark, f"{mark}<title>{escape(title)}</title>")
    return f'<svg class="figure" {view} role="img" aria-label="{escape(description)}">{inner}</svg>'


def _restyle(tag: str, name: str) -> str:
    """Rewrite one tag: prefixed ids and links to them, no font family, CSS variables for colours."""
    tag = re.sub(r"\s+", " ", tag).replace("xlink:href=", "href=")
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", tag)
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, variable)
    return tag
