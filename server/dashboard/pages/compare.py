"""Two runs beside each other: what their studies set differently, and what came of each."""

from __future__ import annotations

from typing import Any

from fedsigma.server.dashboard.pages.charts import comparison
from fedsigma.server.dashboard.pages.run_view import Sections, short
from fedsigma.server.report.data import Content, gather
from fedsigma.server.report.formatting import METHODS, NOTHING, amount, duration, percent, points
from fedsigma.server.runs.tail import FollowedRun

__all__ = ["compare_view"]


def compare_view(first: FollowedRun, second: FollowedRun) -> Sections:
    """What the page shows."""
    contents = [gather(folder, shift=False) for folder in (first, second)]
    return Sections(
        view={
            "settings": _settings(*(content.study for content in contents)),
            "results": _results(contents),
            "sites": _by_site(contents),
        },
        charts={"runs": comparison((first, second))},
    )


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    one, two = flat(first), flat(second)
    names = dict.fromkeys((*one, *two))
    return [(n, one.get(n, NOTHING), two.get(n, NOTHING)) for n in names if one.get(n) != two.get(n)]


def flat(values: dict[str, Any], before: str = "") -> dict[str, str]:
    """A study's settings by their full names, `federation.rounds` and so on."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = short(value) if value is not None else NOTHING
    return found


def _results(contents: list[Content]) -> list[tuple[str, ...]]:
    rows = [("Rounds done", *(str(c.overview.rounds_done) for c in contents))]
    rows.append(("Newest accuracy", *(percent(c.overview.federated_accuracy) for c in contents)))
    for name, words in METHODS.items():
        values = [c.methods.get(name, {}).get("accuracy") for c in contents]
        if any(value is not None for value in values):
            rows.append((words, *(percent(value) for value in values)))
    rows.append(("From the sites", *(amount(c.bytes_up) for c in contents)))
    rows.append(("To the sites", *(amount(c.bytes_down) for c in contents)))
    rows.append(("Time", *(duration(c.overview.seconds) for c in contents)))
    return rows


def _by_site(contents: list[Content]) -> list[tuple[str, str, str, str]]:
    newest = [{site: told[max(told)] for site, told in c.accuracy.items() if told} for c in contents]
    found = []
    for site in dict.fromkeys((*newest[0], *newest[1])):
        one, two = (told.get(site) for told in newest)
        both = points(two - one) if one is not None and two is not None else NOTHING
        found.append((site, percent(one), percent(two), both))
    return found
