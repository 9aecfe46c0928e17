"""What the comparison says: tables, the Pareto front and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.methods.catalogue import CANDIDATES, Setting
from fedsigma.common.utils.console import print_table

__all__ = ["SIGMA", "Rows", "combine", "front", "markdown", "print_search", "verdicts"]

Rows = Mapping[str, Mapping[str, Any]]
SIGMA = ("sigma", "sigma-small")
POINTS, SHARE = 0.5, 0.1
"""The reach: on the front, and best of all or at most so many points below at less than this share of the
best one's bytes."""


def combine(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of one method's runs: mean, spread (standard deviation over seeds), per site the mean, bytes."""
    totals = [run["accuracy"]["all"] for run in runs]
    by_site: dict[str, list[float]] = {}
    for run in runs:
        for site, value in run["accuracy"].items():
            by_site.setdefault(site, []).append(value)  # in some divisions a site has no test image
    return {
        "mean": statistics.mean(totals),
        "spread": statistics.stdev(totals) if len(totals) > 1 else None,
        "per_site": {site: statistics.mean(of) for site, of in by_site.items() if site != "all"},
        "seeds": {str(run["seed"]): run["accuracy"]["all"] for run in runs},
        **{name: statistics.mean(run[name] for run in runs) for name in _BYTES},
    }


_BYTES = ("bytes_upload", "bytes_float32", "bytes_total")


def front(rows: Rows) -> list[str]:
    """The methods that no other beats: at most as many bytes and a higher accuracy, or fewer and as high."""

    def beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        no_worse = one["bytes_total"] <= other["bytes_total"] and one["mean"] >= other["mean"]
        return no_worse and (one["bytes_total"], one["mean"]) != (other["bytes_total"], other["mean"])

    found = [name for name, own in rows.items() if not any(beats(one, own) for one in rows.values())]
    return sorted(found, key=lambda name: rows[name]["bytes_total"])


def markdown(study: str, rows: Rows) -> str:
    """The table of docs/research/methods.md."""
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
    """Whether sigma reaches what was wanted of it, in one line each."""
    others = [name for name in rows if name not in SIGMA and not CANDIDATES[name].strategy]
    if not others:
        return []
    best = max(others, key=lambda name: rows[name]["mean"])
    lines = []
    for name in (name for name in SIGMA if name in rows):
        own, other, ahead = rows[name], rows[best], name in front(rows)
        behind = round(100 * (other["mean"] - own["mean"]), 9)
        share = own["bytes_total"] / other["bytes_total"] if other["bytes_total"] else float("inf")
        reached = ahead and (behind < 0 or (behind <= POINTS and share < SHARE))
        uncoded = own["bytes_float32"] / other["bytes_float32"] if other["bytes_float32"] else float("inf")
        lines.append(
            f"{study}: {CANDIDATES[name].title} is {'' if ahead else 'not '}on the front; "
            f"{abs(behind):.1f} points {'above' if behind < 0 else 'below'} the best other method "
            f"({CANDIDATES[best].title}) at {share:.3g} of its bytes (both as float32: {uncoded:.3g}): "
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
