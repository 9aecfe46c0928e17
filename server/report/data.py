"""What a report says, gathered from the files of a run and free of any layout or colour."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fedsigma.server.report.formatting import METHODS, round_list
from fedsigma.server.runs.rounds_table import ALL_SITES
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.runs.shift_magnitude import ShiftMagnitude, shift_magnitudes
from fedsigma.server.runs.summary import RunSummary, study_of, summarize_run

__all__ = ["Notice", "ReportData", "RoundLine", "collect_report_data"]

_NOTABLE = {
    "site_refused": "took no part",
    "reply_rejected": "reply rejected",
    "site_failed": "site failed",
    "site_budget_exhausted": "privacy budget spent: no more training",
    "budgets_exhausted": "ended early: privacy budgets spent",
    "site_timed_out": "no reply in time",
    "masked_sum_rejected": "masked sum rejected",
    "unreadable_line": "line of events.jsonl unreadable",
}


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One round over all its sites.

    Units: accuracies between 0 and 1 (of the model the round started from), bytes as sums over the sites.
    """

    round: int
    pooled: float | None
    lowest: float | None
    highest: float | None
    sites: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that went otherwise than planned, told once however often it happened."""

    what: str
    site: str
    reason: str
    rounds: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All of a report.

    `accuracy` maps a site to the accuracy after so many finished rounds, 0 being the untouched backbone.
    `methods` are the entries of summary.json that are there, in the order to show them. `epsilon` is the most
    that any site's images (or the sites) have been told to have spent.
    """

    run: RunSummary
    study: dict[str, Any]
    study_yaml: str
    summary: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    sites: tuple[str, ...]
    accuracy: dict[str, dict[int, float]]
    pooled: dict[int, float]
    lines: tuple[RoundLine, ...]
    notices: tuple[Notice, ...]
    shift_magnitudes: tuple[ShiftMagnitude, ...]
    heat_problem: str
    sigma_values: int | None
    sigma_round: int | None
    epsilon: float | None

    @property
    def bytes_up(self) -> int:
        """All that the sites sent in the whole run."""
        return sum(line.bytes_up for line in self.lines)

    @property
    def bytes_down(self) -> int:
        """All that the sites received in the whole run."""
        return sum(line.bytes_down for line in self.lines)

    @property
    def zero_shot(self) -> float | None:
        """Accuracy of the untouched backbone: the baseline's, else of the model round 1 began with."""
        return _number(self.methods.get("zero_shot", {}).get("accuracy"), self.pooled.get(0))


def collect_report_data(folder: RunDir, *, shift: bool = True) -> ReportData:
    """Read a run folder, whatever state it is in; what is missing or damaged is left out.

    Args:
        folder: of the run.
        shift: whether to read the sigma file, too.
    """
    rows = folder.rounds()
    try:
        summary = folder.read_summary()
    except RunDirError:
        summary = {}
    methods = {name: summary[name] for name in METHODS if isinstance(summary.get(name), dict)}
    heats, problem, values, sigma_round = _heats(folder) if shift else ((), "", None, None)
    return ReportData(
        run=summarize_run(folder),
        study=study_of(folder),
        study_yaml=folder.study_yaml,
        summary=summary,
        methods=methods,
        sites=_sites(rows, summary, methods),
        accuracy=_accuracy(row for row in rows if row["site"] != ALL_SITES),
        pooled=_accuracy(row for row in rows if row["site"] == ALL_SITES).get(ALL_SITES, {}),
        lines=_lines(rows),
        notices=_notices(folder.events()),
        shift_magnitudes=heats,
        heat_problem=problem,
        sigma_values=values,
        sigma_round=sigma_round,
        epsilon=max((row["epsilon"] for row in rows if row.get("epsilon") is not None), default=None),
    )


def _number(*candidates: Any) -> float | None:
    return next((float(c) for c in candidates if isinstance(c, int | float)), None)


def _sites(rows: list[dict[str, Any]], summary: dict[str, Any], methods: dict[str, Any]) -> tuple[str, ...]:
    """Every site that is named anywhere, in the summary's order first."""
    listed = summary.get("sites")
    names = [str(site) for site in listed] if isinstance(listed, list) else []
    for method in methods.values():
        names += list(method.get("per_site") or {})
    names += [row["site"] for row in rows if row["site"] != ALL_SITES]
    return tuple(dict.fromkeys(names))


def _accuracy(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("accuracy") is not None:
            # A row tells of the model its round began with, so one round fewer is behind that model.
            series.setdefault(row["site"], {})[row["round"] - 1] = row["accuracy"]
    return series


def _lines(rows: list[dict[str, Any]]) -> tuple[RoundLine, ...]:
    found = []
    for number, group in groupby(rows, key=lambda row: row["round"]):
        here = list(group)
        sites = [row for row in here if row["site"] != ALL_SITES]
        pooled = [row["accuracy"] for row in here if row["site"] == ALL_SITES]
        known = [row["accuracy"] for row in sites if row.get("accuracy") is not None]
        line = RoundLine(
            round=number,
            pooled=pooled[-1] if pooled else None,
            lowest=min(known, default=None),
            highest=max(known, default=None),
            sites=sum(row["status"] == "accepted" for row in sites),
            bytes_up=sum(row["bytes_up"] for row in sites),
            bytes_down=sum(row["bytes_down"] for row in sites),
        )
        found.append(line)
    return tuple(found)


def _notices(events: list[dict[str, Any]]) -> tuple[Notice, ...]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    starts = 0
    for event in events:
        starts += event["kind"] == "run_start"
        if event["kind"] == "run_start" and starts > 1:
            groups.setdefault(("run resumed", "", ""), []).append(0)
        if event["kind"] in _NOTABLE:
            key = (_NOTABLE[event["kind"]], str(event.get("site") or ""), str(event.get("reason") or ""))
            number = event.get("round")
            groups.setdefault(key, []).append(number if isinstance(number, int) else 0)
    found = []
    for (what, site, reason), numbers in groups.items():
        rounds = round_list(number for number in numbers if number)
        found.append(Notice(what=what, site=site, reason=reason, rounds=rounds, count=len(numbers)))
    return tuple(found)


def _heats(folder: RunDir) -> tuple[tuple[ShiftMagnitude, ...], str, int | None, int | None]:
    """The shift by tower, part and layer; or in one sentence why there is none."""
    if not folder.has_shift:
        return (), "No round has produced a sigma shift yet.", None, None
    from fedsigma.common.registry.shift_file import ShiftFileError
    from fedsigma.common.sigma.layout import Layout, LayoutError

    try:
        saved = folder.load_shift()
        layout = Layout.from_json(saved.layout_json)
    except (ShiftFileError, LayoutError) as error:
        return (), f"The sigma shift cannot be shown: {error}.", None, None
    shift = saved.shift.numpy()
    if shift.size != layout.size:
        problem = f"The sigma shift cannot be shown: it has {shift.size} values, its layout {layout.size}."
        return (), problem, None, None
    return shift_magnitudes(shift, layout), "", int(shift.size), saved.round
