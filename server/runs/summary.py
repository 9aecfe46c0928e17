"""What can be said of a run at a glance, and where the runs are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsigma.common.utils.files import runs_folder
from fedsigma.server.runs.append_log import CHUNK, Row, first_line, last_lines, parse_object
from fedsigma.server.runs.rounds_table import ALL_SITES, latest_rows, parse_row, split_cells
from fedsigma.server.runs.run_dir import RunDir, RunDirError

__all__ = ["RunSummary", "find_runs", "last_contacts", "runs_folder", "study_of", "summarize_run"]

_ANSWERS = frozenset({"site_ready", "reply_accepted", "reply_rejected", "evaluation_accepted"})
"""The kinds of events that came of a message from the site that they name."""

_DEPTH = 2  # a run folder lies in the given directory, or in one of its subdirectories


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run in one line.

    Units: started in seconds since 1970, seconds in seconds, federated_accuracy between 0 and 1.
    """

    path: str
    study: str
    state: str  # running, interrupted, finished or failed
    reason: str  # why it failed, else empty
    rounds_done: int
    rounds_planned: int | None
    sites: int
    federated_accuracy: float | None  # of the final model, or of the newest one while the run goes on
    started: float | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's own types."""
        return asdict(self)


def study_of(folder: RunDir) -> dict[str, Any]:
    """The study as a mapping; empty if study.yaml cannot be read as one."""
    try:
        # LibYAML's parser where there is one: ten times as fast, and a list of runs reads many.
        found = yaml.load(folder.study_yaml, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def summarize_run(folder: RunDir) -> RunSummary:
    """Say how far a run has come.

    Of the files that grow only the ends are read, so that a list of many long runs is there at once.
    """
    study, summary = study_of(folder), _summary(folder)
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
    """The last events, back to the newest end of a round or start of the run at least."""
    for lines in _ever_more(folder.path / "events.jsonl"):
        found = [event for event in map(_event, lines) if event]
        if any(event["kind"] in ("round_end", "run_start") for event in found):
            break
    return found


def _newest_rows(folder: RunDir) -> list[Row]:
    """The last rows, back to two judgements of the pooled model at least: one whole round is between them."""
    header = split_cells(first_line(folder.path / "rounds.csv"))
    for lines in _ever_more(folder.path / "rounds.csv"):
        # The header is no row: its cells are no numbers.
        found = latest_rows(parse_row(header, split_cells(line)) for line in lines)
        if sum(row["site"] == ALL_SITES and row.get("accuracy") is not None for row in found) > 1:
            break
    return found


def _ever_more(path: Path) -> Iterator[list[str]]:
    """The last lines of a file, more of them each time, and at last all."""
    whole = path.stat().st_size if path.is_file() else 0
    size = min(CHUNK, whole)
    while True:
        yield last_lines(path, size=size)
        if size >= whole:
            return
        size = min(4 * size, whole)


def _event(line: str) -> Row | None:
    return parse_object(line, {"kind": str})


def last_contacts(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """When each site was last heard of, in seconds since 1970, by events of one run or of several."""
    heard: dict[str, float] = {}
    for event in events:
        site, time = event.get("site"), event.get("time")
        if event["kind"] in _ANSWERS and isinstance(site, str) and isinstance(time, int | float):
            heard[site] = max(float(time), heard.get(site, 0.0))
    return heard


def find_runs(directory: Path) -> list[Path]:
    """The run folders in a directory (or the directory itself), in the order of their names.

    Raises:
        RunDirError: There is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RunDirError(f"no directory {directory}: name the one that holds the run folders")
    return sorted(_walk(directory, _DEPTH))


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    if (directory / "study.yaml").is_file():
        yield directory
    elif depth > 0:
        for child in directory.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _walk(child, depth - 1)


def _summary(folder: RunDir) -> dict[str, Any]:
    try:
        return folder.read_summary()
    except RunDirError:
        return {}


def _state(folder: RunDir, events: list[dict[str, Any]]) -> tuple[str, str]:
    """The state since the last start: a run may fail, be resumed, and finish."""
    for event in reversed(events):
        if event["kind"] == "run_start":
            break
        if event["kind"] == "run_end":
            return ("finished", "") if event.get("ok") else ("failed", str(event.get("reason") or ""))
    return "running" if folder.locked else "interrupted", ""


def _accuracy(summary: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    federated = summary.get("federated")
    if isinstance(federated, dict) and isinstance(federated.get("accuracy"), int | float):
        return float(federated["accuracy"])
    pooled = [row.get("accuracy") for row in rows if row["site"] == ALL_SITES]
    known = [value for value in pooled if value is not None]
    return known[-1] if known else None
