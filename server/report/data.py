"""The data of a report, collected from the files of a run, without layout or colours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.server.report.formatting import METHODS
from fedsigma.server.runs.run_dir import RunDir, RunDirError
from fedsigma.server.runs.shift_magnitude import ShiftMagnitude, shift_magnitudes
from fedsigma.server.runs.summary import RunSummary, study_of, summarize_run

__all__ = ["ReportData", "RoundSummary", "collect_report_data"]

_NOTICES = {
    "site_refused": "site refused",
    "reply_rejected": "reply rejected",
    "site_failed": "site failed",
    "site_budget_exhausted": "privacy budget exhausted: no more training",
    "budgets_exhausted": "ended early: privacy budgets exhausted",
    "site_timed_out": "no reply in time",
    "masked_sum_rejected": "masked sum rejected",
    "unreadable_line": "invalid line in events.jsonl",
}
"""Kinds of events that the report lists, with their labels."""


@dataclass(frozen=True, kw_only=True)
class RoundSummary:
    """One round over all its sites.

    Attributes:
        round: Number of the round, from 1.
        all_sites: Accuracy over all sites of the model that the round started from, 0 to 1.
        lowest: Lowest accuracy of a site, 0 to 1.
        highest: Highest accuracy of a site, 0 to 1.
        accepted: Number of sites whose update was accepted.
        bytes_up: Bytes that the server received, summed over the sites.
        bytes_down: Bytes that the server sent, summed over the sites.
    """

    round: int
    all_sites: float | None
    lowest: float | None
    highest: float | None
    accepted: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All data of a report.

    Attributes:
        run: State, progress and times of the run.
        study: The study's settings, as a mapping.
        study_yaml: The study file as text.
        summary: Content of summary.json; empty if it is missing or damaged.
        methods: Entries of summary.json by method, in display order.
        sites: Names of all sites.
        accuracy: Accuracy by site and number of finished rounds; 0 is the unadapted backbone.
        accuracy_all_sites: Accuracy over all sites by number of finished rounds.
        rounds: Summary of each round.
        notices: Rounds of each problem by label, site and reason; 0 for an event outside rounds.
        shift_magnitudes: Mean absolute shift by tower, part and layer.
        shift_missing: Why there are no shift magnitudes; empty if there are.
        shift_size: Number of values of the shift.
        shift_round: Round after which the shift was saved.
        epsilon: Largest epsilon that a site has reported.
    """

    run: RunSummary
    study: dict[str, Any]
    study_yaml: str
    summary: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    sites: tuple[str, ...]
    accuracy: dict[str, dict[int, float]]
    accuracy_all_sites: dict[int, float]
    rounds: tuple[RoundSummary, ...]
    notices: dict[tuple[str, str, str], list[int]]
    shift_magnitudes: tuple[ShiftMagnitude, ...]
    shift_missing: str
    shift_size: int | None
    shift_round: int | None
    epsilon: float | None

    @property
    def bytes_up(self) -> int:
        """Bytes that all sites sent in the whole run."""
        return sum(row.bytes_up for row in self.rounds)

    @property
    def bytes_down(self) -> int:
        """Bytes that all sites received in the whole run."""
        return sum(row.bytes_down for row in self.rounds)

    @property
    def zero_shot(self) -> float | None:
        """Accuracy of the unadapted backbone: the baseline's, else that of round 1's starting model."""
        accuracy = self.methods.get("zero_shot", {}).get("accuracy")
        return float(accuracy) if isinstance(accuracy, int | float) else self.accuracy_all_sites.get(0)


def collect_report_data(run_dir: RunDir, *, read_shift: bool = True) -> ReportData:
    """Read a run folder in any state, with its shift file if `read_shift`; damaged files are left out."""
    rows = run_dir.rounds()
    try:
        summary = run_dir.read_summary()
    except RunDirError:
        summary = {}
    methods = {name: summary[name] for name in METHODS if isinstance(summary.get(name), dict)}
    magnitudes, missing, size, shift_round = _read_shift(run_dir) if read_shift else ((), "", None, None)
    return ReportData(
        run=summarize_run(run_dir),
        study=study_of(run_dir),
        study_yaml=run_dir.study_yaml,
        summary=summary,
        methods=methods,
        sites=_site_names(rows, summary, methods),
        accuracy=_accuracy(row for row in rows if row["site"] != ALL_SITES),
        accuracy_all_sites=_accuracy(row for row in rows if row["site"] == ALL_SITES).get(ALL_SITES, {}),
        rounds=_rounds(rows),
        notices=_notices(run_dir.events()),
        shift_magnitudes=magnitudes,
        shift_missing=missing,
        shift_size=size,
        shift_round=shift_round,
        epsilon=max((row["epsilon"] for row in rows if row.get("epsilon") is not None), default=None),
    )


def _site_names(
    rows: list[dict[str, Any]], summary: dict[str, Any], methods: dict[str, Any]
) -> tuple[str, ...]:
    """Names of all sites in any file, in the order of the summary first."""
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
            # A row has the accuracy of the model that its round started from.
            series.setdefault(row["site"], {})[row["round"] - 1] = row["accuracy"]
    return series


def _rounds(rows: list[dict[str, Any]]) -> tuple[RoundSummary, ...]:
    summaries = []
    for number, group in groupby(rows, key=lambda row: row["round"]):
        sites, all_sites = [], None
        for row in group:
            if row["site"] == ALL_SITES:
                all_sites = row["accuracy"]
            else:
                sites.append(row)
        accuracies = [row["accuracy"] for row in sites if row.get("accuracy") is not None]
        summary = RoundSummary(
            round=number,
            all_sites=all_sites,
            lowest=min(accuracies, default=None),
            highest=max(accuracies, default=None),
            accepted=sum(row["status"] == "accepted" for row in sites),
            bytes_up=sum(row["bytes_up"] for row in sites),
            bytes_down=sum(row["bytes_down"] for row in sites),
        )
        summaries.append(summary)
    return tuple(summaries)


def _notices(events: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[int]]:
    notices: dict[tuple[str, str, str], list[int]] = {}
    started = False
    for event in events:
        if event["kind"] == "run_start" and started:
            notices.setdefault(("run resumed", "", ""), []).append(0)
        started = started or event["kind"] == "run_start"
        if event["kind"] in _NOTICES:
            key = (_NOTICES[event["kind"]], str(event.get("site") or ""), str(event.get("reason") or ""))
            number = event.get("round")
            notices.setdefault(key, []).append(number if isinstance(number, int) else 0)
    return notices


def _read_shift(run_dir: RunDir) -> tuple[tuple[ShiftMagnitude, ...], str, int | None, int | None]:
    """Return the shift magnitudes, why there are none, the shift's size and its round."""
    if not run_dir.shift_path.is_file():
        return (), "No round has produced a shift yet.", None, None
    from fedsigma.common.registry.shift_file import ShiftFileError
    from fedsigma.common.sigma.layout import Layout, LayoutError

    try:
        saved = run_dir.load_shift()
        layout = Layout.from_json(saved.layout_json)
    except (ShiftFileError, LayoutError) as error:
        return (), f"The shift cannot be shown: {error}.", None, None
    shift = saved.shift.numpy()
    if shift.size != layout.size:
        reason = f"The shift cannot be shown: it has {shift.size} values, its layout {layout.size}."
        return (), reason, None, None
    return shift_magnitudes(shift, layout), "", int(shift.size), saved.round
