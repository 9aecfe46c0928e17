"""What the comparison says: tables, the Pareto front, verdicts and the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.methods.catalogue import CANDIDATES, Setting
from fedsigma.common.printing import print_table

__all__ = ["combine", "draw", "front", "markdown", "print_search", "verdicts"]

Rows = Mapping[str, Mapping[str, Any]]
SIGMA = ("sigma", "sigma-small")
POINTS, SHARE = 0.5, 0.1
"""The reach: at most so many points below the best method, at less than this share of its bytes."""


def combine(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of one method's runs: mean, spread (standard deviation over seeds), per site the mean, bytes."""
    totals = [run["accuracy"]["all"] for run in runs]
    sites = [site for site in runs[0]["accuracy"] if site != "all"]
    return {
        "mean": statistics.mean(totals),
        "spread": statistics.stdev(totals) if len(totals) > 1 else None,
        "per_site": {site: statistics.mean(run["accuracy"][site] for run in runs) for site in sites},
        "seeds": {str(run["seed"]): run["accuracy"]["all"] for run in runs},
        **{name: statistics.mean(run[name] for run in runs) for name in _BYTES},
    }


_BYTES = ("bytes_upload", "bytes_float32", "bytes_total")


def front(rows: Rows) -> list[str]:
    """The methods that no other beats: at most as many bytes and a higher accuracy, or fewer and as high."""
    found, best = [], -1.0
    for name in sorted(rows, key=lambda name: (rows[name]["bytes_total"], -rows[name]["mean"])):
        if rows[name]["mean"] > best:
            found.append(name)
            best = rows[name]["mean"]
    return found


def markdown(study: str, rows: Rows) -> str:
    """The table of docs/results.md."""
    best = front(rows)
    lines = [
        f"### {study}",
        "",
        "| method | accuracy | seeds | bytes an upload | bytes a site sent | front |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in rows.items():
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["seeds"].values())
        cells = [CANDIDATES[name].title, f"{100 * row['mean']:.1f}{spread}", seeds]
        cells += [f"{row['bytes_upload']:,.0f}", f"{row['bytes_total']:,.0f}", "yes" if name in best else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def verdicts(study: str, rows: Rows) -> list[str]:
    """Whether sigma reaches what was wanted of it, in one line each."""
    lines, best = [], max(rows, key=lambda name: rows[name]["mean"]) if rows else ""
    for name in (name for name in SIGMA if name in rows):
        own, other = rows[name], rows[best]
        behind = 100 * (other["mean"] - own["mean"])
        share = own["bytes_total"] / other["bytes_total"] if other["bytes_total"] else math.inf
        reached = behind <= POINTS and share < SHARE
        lines.append(
            f"{study}: {CANDIDATES[name].title} is {'' if name in front(rows) else 'not '}on the front; "
            f"{behind:.1f} points below the best ({CANDIDATES[best].title}) at {share:.3g} of its bytes: "
            f"the reach is {'' if reached else 'not '}met"
        )
    return lines


def print_search(study: str, tried: Mapping[str, Sequence[tuple[Setting, float | None]]]) -> None:
    """Every setting that was tried, with its accuracy on validation images."""
    print(f"{study}: settings tried")
    rows = [
        {"method": name, "setting": _words(setting), "accuracy": "" if value is None else f"{value:.3f}"}
        for name, found in tried.items()
        for setting, value in found
    ]
    print_table(["method", "setting", "accuracy"], rows)


def _words(setting: Setting) -> str:
    flat = {key: value for key, value in setting.items() if key != "options"} | setting.get("options", {})
    return ", ".join(f"{key} {value:g}" for key, value in flat.items())


def draw(results: Mapping[str, Rows], path: Path) -> None:
    """Accuracy against bytes sent, a panel a study, with the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(6.2 * len(results), 4.8), squeeze=False)
    for panel, (study, rows) in zip(panels[0], results.items(), strict=True):
        shown = {name: row for name, row in rows.items() if row["bytes_total"]}
        best = [name for name in front(rows) if name in shown]
        panel.step(
            [shown[name]["bytes_total"] for name in best],
            [100 * shown[name]["mean"] for name in best],
            where="post",
            color="0.7",
            linewidth=1,
            zorder=1,
        )
        for name, row in shown.items():
            colour = "tab:red" if name in SIGMA else "tab:orange" if CANDIDATES[name].strategy else "tab:blue"
            error = 100 * (row["spread"] or 0)
            panel.errorbar(row["bytes_total"], 100 * row["mean"], yerr=error or None, fmt="o", color=colour)
            if not CANDIDATES[name].strategy:
                at = (row["bytes_total"], 100 * row["mean"])
                panel.annotate(
                    CANDIDATES[name].title, at, xytext=(5, 4), textcoords="offset points", fontsize=7
                )
        if "zero-shot" in rows:
            panel.axhline(
                100 * rows["zero-shot"]["mean"], color="0.5", linestyle=":", label="zero-shot, no bytes"
            )
            panel.legend(fontsize=7, loc="lower right")
        panel.set(xscale="log", title=study, xlabel="bytes a site sent", ylabel="accuracy in per cent")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
