"""The comparison as a figure: accuracy against bytes sent, a panel a study, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.methods.catalogue import CANDIDATES
from bench.methods.tables import SIGMA, Rows, front

_OFFSETS = tuple(
    (dx, dy, "left" if dx > 0 else "right") for dy in (7, -7, 17, -17, 27, -27) for dx in (6, -6)
)
"""Offsets of a label from its point, and its alignment: the first free one is used."""


def draw(results: Mapping[str, Rows], path: Path) -> None:
    """Draw the figure. Methods that send nothing are lines; sigma's other strategies have no label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(6.6 * len(results), 5.2), squeeze=False)
    for panel, (study, rows) in zip(panels[0], results.items(), strict=True):
        _points(panel, rows)
        panel.set(xscale="log", title=study, xlabel="bytes a site sent", ylabel="accuracy in per cent")
        panel.margins(x=0.12, y=0.08)
        panel.grid(alpha=0.2)
        if rows:
            panel.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    for panel, rows in zip(panels[0], results.values(), strict=True):
        _labels(panel, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _positions(rows: Rows) -> dict[str, tuple[float, float]]:
    """Return bytes and accuracy in per cent of each method that sends something."""
    return {name: (row["bytes_total"], 100 * row["mean"]) for name, row in rows.items() if row["bytes_total"]}


def _points(panel: Any, rows: Rows) -> None:
    positions = _positions(rows)
    best = [positions[name] for name in front(rows) if name in positions]
    x, y = [point[0] for point in best], [point[1] for point in best]
    if best:
        # Extend to the right end: methods that send more and are not better are behind the front.
        x, y = [*x, max(point[0] for point in positions.values())], [*y, y[-1]]
    panel.step(x, y, where="post", color="0.7", linewidth=1.2, zorder=1, label="front")
    for name, point in positions.items():
        error = 100 * (rows[name]["spread"] or 0)
        other = bool(CANDIDATES[name].strategy)
        colour = "tab:red" if name in SIGMA else "tab:orange" if other else "tab:blue"
        panel.errorbar(*point, yerr=error or None, fmt="o", color=colour, markersize=4 if other else 6)
    if any(CANDIDATES[name].strategy for name in positions):
        panel.plot([], [], "o", color="tab:orange", markersize=4, label="sigma by other strategies")
    if "zero-shot" in rows:
        panel.axhline(
            100 * rows["zero-shot"]["mean"], color="0.5", linestyle=":", label="zero-shot, no bytes"
        )


def _labels(panel: Any, rows: Rows) -> None:
    """Write names beside the points, where they cover no other name and no point."""
    renderer = panel.figure.canvas.get_renderer()
    positions = _positions(rows)
    boxes = [panel.get_legend().get_window_extent(renderer)] if panel.get_legend() else []
    pixels = panel.transData.transform(list(positions.values())) if positions else []
    for name in (name for name in positions if not CANDIDATES[name].strategy):
        for dx, dy, side in _OFFSETS:
            label = panel.annotate(
                CANDIDATES[name].title,
                positions[name],
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=8,
                ha=side,
                va="center",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            )
            box = label.get_window_extent(renderer).padded(3)
            inside = panel.bbox.x0 <= box.x0 and box.x1 <= panel.bbox.x1
            free = not any(box.overlaps(other) for other in boxes)
            if inside and free and not any(box.contains(x, y) for x, y in pixels):
                break
            if (dx, dy, side) != _OFFSETS[-1]:
                label.remove()
        boxes.append(box)
