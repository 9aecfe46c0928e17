"""Short summaries of runs, and the search for run folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.utils.files import runs_folder
from fedsigma.common.utils.json_lines import CHUNK, Row, first_line, last_lines, parse_object
from fedsigma.server.runs.rounds_table import latest, parse_row, split_cells
from fedsigma.server.runs.run_dir import RunDir, RunDirError, is_run_folder

__all__ = ["RunSummary", "find_runs", "last_contacts", "runs_folder", "study_of", "summarize_run"]

_SITE_EVENTS = frozenset({"site_ready", "reply_accepted", "reply_rejected", "evaluation_accepted"})
"""Kinds of events that a message from the named site caused."""

_DEPTH = 2  # a run folder is in the given directory, or in one of its subdirectories


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Summary of one run.

    Attributes:
        path: The run folder.
        study: Name of the study.
        state: `running`, `interrupted`, `finished` or `failed`.
        reason: Why the run failed, else empty.
        rounds_done: Finished rounds.
        rounds_planned: Rounds of the study, None if unknown.
        sites: Number of sites.
        federated_accuracy: Accuracy of the final model, or of the newest one of an unfinished run, 0 to 1.
        started: Seconds since 1970.
        seconds: Duration in seconds.
    """

    path: str
    study: str
    state: str
    reason: str
    rounds_done: int
    rounds_planned: int | None
    sites: int
    federated_accuracy: float | None
    started: float | None
    seconds: float | None


def study_of(folder: RunDir) -> dict[str, Any]:
    """Return the study as a mapping; empty if study.yaml cannot be parsed as one."""
    try:
        # LibYAML's parser where there is one: ten times as fast, and a list of runs reads many.
        study = yaml.load(folder.study_yaml, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}
    return study if isinstance(study, dict) else {}


def summarize_run(folder: RunDir) -> RunSummary:
    """Summarize a run from the ends of its growing files, so that a list of many long runs is fast."""
    study = study_of(folder)
    try:
        summary = folder.read_summary()
    except RunDirError:
        summary = {}
    events, rows = _newest_events(folder), _newest_rows(folder)
    state, reason = _state(folder, events)
    first = _event(first_line(folder.path / "events.jsonl"))
    times = [e["time"] for e in (first, *events[-1:]) if e and isinstance(e.get("time"), int | float)]
    federation = study.get("federation")
    planned = federation.get("rounds") if isinstance(federation, dict) else None
    ended = [e["round"] for e in events if e["kind"] == "round_end" and isinstance(e.get("round"), int)]
    sites = summary.get("sites")
    named = sites if isinstance(sites, list) else {row["site"] for row in rows} - {ALL_SITES}
    return RunSummary(
        path=str(folder.path),
        study=str(study.get("name") or folder.path.name),
        state=state,
        reason=reason,
        rounds_done=max(ended, default=0),
        rounds_planned=planned if isinstance(planned, int) else None,
        sites=len(named),
        federated_accuracy=_accuracy(summary, rows),
        started=times[0] if times else None,
        seconds=summary.get("seconds") or (times[-1] - times[0] if times else None),
    )


def _newest_events(folder: RunDir) -> list[Row]:
    """Return the last events, back to at least the newest end of a round or start of the run."""
    for lines in _growing_tails(folder.path / "events.jsonl"):
        events = [event for event in map(_event, lines) if event]
        if any(event["kind"] in ("round_end", "run_start") for event in events):
            break
    return events


def _newest_rows(folder: RunDir) -> list[Row]:
    """Return the last rows, back to at least two evaluations over all sites: a full round is between them."""
    header = split_cells(first_line(folder.path / "rounds.csv"))
    for lines in _growing_tails(folder.path / "rounds.csv"):
        # The header is not parsed as a row, since its cells are not numbers.
        parsed = (parse_row(header, split_cells(line)) for line in lines)
        rows = latest((row for row in parsed if row), "site")
        if len(_accuracies(rows)) > 1:
            break
    return rows


def _growing_tails(path: Path) -> Iterator[list[str]]:
    """Yield the last lines of a file, more of them each time, and finally all."""
    total = path.stat().st_size if path.is_file() else 0
    size = min(CHUNK, total)
    while True:
        yield last_lines(path, size=size)
        if size >= total:
            return
        size = min(4 * size, total)


def _event(line: str) -> Row | None:
    return parse_object(line, {"kind": str})


def last_contacts(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return when each site last sent a message, in seconds since 1970, from the events of runs."""
    contacts: dict[str, float] = {}
    for event in events:
        site, time = event.get("site"), event.get("time")
        if event["kind"] in _SITE_EVENTS and isinstance(site, str) and isinstance(time, int | float):
            contacts[site] = max(float(time), contacts.get(site, 0.0))
    return contacts


def find_runs(directory: Path) -> list[Path]:
    """Return the run folders in a directory (or the directory itself), sorted by path.

    Raises:
        RunDirError: The directory does not exist.
    """
    if not directory.is_dir():
        raise RunDirError(f"directory {directory} does not exist: name the one that holds the run folders")
    return sorted(_walk(directory, _DEPTH))


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    if is_run_folder(directory):
        yield directory
    elif depth > 0:
        for child in directory.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _walk(child, depth - 1)


def _state(folder: RunDir, events: list[Row]) -> tuple[str, str]:
    """Return state and reason since the last start: a run may fail, be resumed, and finish."""
    for event in reversed(events):
        if event["kind"] == "run_start":
            break
        if event["kind"] == "run_end":
            return ("finished", "") if event.get("ok") else ("failed", str(event.get("reason") or ""))
    return "running" if folder.locked else "interrupted", ""


def _accuracy(summary: Row, rows: list[Row]) -> float | None:
    federated = summary.get("federated")
    if isinstance(federated, dict) and isinstance(federated.get("accuracy"), int | float):
        return float(federated["accuracy"])
    return next(reversed(_accuracies(rows)), None)


def _accuracies(rows: list[Row]) -> list[float]:
    accuracies = (row.get("accuracy") for row in rows if row["site"] == ALL_SITES)
    return [accuracy for accuracy in accuracies if accuracy is not None]
