"""What the comparison says: tables, the Pareto front and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.methods.catalogue import CANDIDATES, Setting
from fedsigma.common.printing import print_table

__all__ = ["SIGMA", "Rows", "combine", "front", "markdown", "print_search", "verdicts"]

Rows = Mapping[str, Mapping[str, Any]]
SIGMA = ("sigma", "sigma-small")
POINTS, SHARE = 0.5, 0.1
"""The reach: on the front, and best of all or at most so many points below at less than this share of the
best one's bytes."""


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
        lines.append(
            f"{study}: {CANDIDATES[name].title} is {'' if ahead else 'not '}on the front; "
            f"{abs(behind):.1f} points {'above' if behind < 0 else 'below'} the best other method "
            f"({CANDIDATES[best].title}) at {share:.3g} of its bytes: "
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
