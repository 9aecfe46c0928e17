"""Results of the comparison: tables, the Pareto front and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness import Table
from bench.methods.catalogue import CANDIDATES, Setting

Rows = Mapping[str, Mapping[str, Any]]
SIGMA = ("sigma", "sigma-small")
POINTS, SHARE = 0.5, 0.1
"""The aim: on the front, and best of all or at most so many points below the best at less than this share of
its bytes."""


def combine(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one method's mean, spread (standard deviation over seeds), mean per site, and bytes."""
    totals = [run["accuracy"]["all"] for run in runs]
    by_site: dict[str, list[float]] = {}
    for run in runs:
        for site, value in run["accuracy"].items():
            by_site.setdefault(site, []).append(value)  # in some partitions a site has no test images
    return {
        "mean": statistics.mean(totals),
        "spread": statistics.stdev(totals) if len(totals) > 1 else None,
        "per_site": {site: statistics.mean(values) for site, values in by_site.items() if site != "all"},
        "seeds": {str(run["seed"]): run["accuracy"]["all"] for run in runs},
        **{name: statistics.mean(run[name] for run in runs) for name in _BYTES},
    }


_BYTES = ("bytes_upload", "bytes_float32", "bytes_total")


def front(rows: Rows) -> list[str]:
    """Return the methods that no other beats by accuracy or bytes without losing in the other."""

    def beats(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        no_worse = row["bytes_total"] <= other["bytes_total"] and row["mean"] >= other["mean"]
        return no_worse and (row["bytes_total"], row["mean"]) != (other["bytes_total"], other["mean"])

    best = [name for name, row in rows.items() if not any(beats(other, row) for other in rows.values())]
    return sorted(best, key=lambda name: rows[name]["bytes_total"])


def markdown(study: str, rows: Rows) -> str:
    """Return the table of docs/research/methods.md."""
    best = front(rows)
    lines = [
        f"### {study}",
        "",
        "| method | accuracy | by seed | bytes an upload | as float32 | bytes a site sent | front |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["seeds"].values())
        cells = [CANDIDATES[name].title, f"{100 * row['mean']:.1f}{spread}", seeds]
        cells += [f"{row[key]:,.0f}" for key in ("bytes_upload", "bytes_float32", "bytes_total")]
        cells.append("yes" if name in best else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def verdicts(study: str, rows: Rows) -> list[str]:
    """Return whether sigma reaches its aim, one line for each codec."""
    others = [name for name in rows if name not in SIGMA and not CANDIDATES[name].strategy]
    if not others:
        return []
    best = max(others, key=lambda name: rows[name]["mean"])
    lines = []
    for name in (name for name in SIGMA if name in rows):
        row, other, ahead = rows[name], rows[best], name in front(rows)
        behind = round(100 * (other["mean"] - row["mean"]), 9)
        share = row["bytes_total"] / other["bytes_total"] if other["bytes_total"] else float("inf")
        reached = ahead and (behind < 0 or (behind <= POINTS and share < SHARE))
        uncoded = row["bytes_float32"] / other["bytes_float32"] if other["bytes_float32"] else float("inf")
        lines.append(
            f"{study}: {CANDIDATES[name].title} is {'' if ahead else 'not '}on the front; "
            f"{abs(behind):.1f} points {'above' if behind < 0 else 'below'} the best other method "
            f"({CANDIDATES[best].title}) at {share:.3g} of its bytes (both as float32: {uncoded:.3g}): "
            f"the aim is {'' if reached else 'not '}met"
        )
    return lines


def print_search(study: str, tried: Mapping[str, Sequence[tuple[Setting, float | None]]]) -> None:
    """Print every setting that was tried, with its accuracy on validation images."""
    print(f"{study}: settings tried")
    table = Table({"method": "<14", "accuracy": ">8.3f", "setting": "<"})
    for name, trials in tried.items():
        for setting, accuracy in trials:
            flat = {k: v for k, v in setting.items() if k != "options"} | setting.get("options", {})
            table.row(name, accuracy, ", ".join(f"{key} {value:g}" for key, value in flat.items()))
