"""The folder of one run: what was asked, what happened, what came of it.

A run may be killed at any moment, so nothing here leaves a half-written file behind. `events.jsonl`,
`rounds.csv` and `shift_magnitude.jsonl` grow by whole lines; a line that a crash cut short is ignored by
readers and removed by the next writer. Everything else is replaced in one step. The files and their fields
are described in `docs/run-folder.md`.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsigma.common.config.constants import METRICS
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.runs import lock
from fedsigma.server.runs.append_log import (
    append_line,
    as_object,
    cell,
    csv_line,
    read_lines,
    read_table,
    repair,
)

if TYPE_CHECKING:  # torch is slow to import and only the sigma file needs it
    import numpy as np
    from torch import Tensor

    from fedsigma.common.registry.shift_file import SavedShift

__all__ = [
    "ALL_SITES",
    "METRIC_COLUMNS",
    "Row",
    "RunDir",
    "RunDirError",
    "latest_rows",
    "parse_row",
]

ALL_SITES = "pooled"
"""The site name of the line of `rounds.csv` that is computed over all sites' test images."""

METRIC_COLUMNS = (
    *(*METRICS, "loss", "examples", "test_examples", "epsilon"),
    *("update_norm", "update_cosine", "shift_norm"),
)
"""The metric columns that every `rounds.csv` has; a run may add more, to the right of these."""

_FIXED = ("round", "site", "status", "bytes_up", "bytes_down", "reason")
_WHOLE = {"round", "bytes_up", "bytes_down", "examples", "test_examples"}
_TEXT = {"site", "status", "reason"}
_METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")

Row = dict[str, Any]


class RunDirError(FedSigmaError, ValueError):
    """A run folder is missing, already taken, or not a run folder."""


class RunDir:
    """One run's files, to write them while it runs and to read them at any time.

    Opening a folder changes nothing in it, so a run can be watched while another process writes it.
    The methods that append may be called from several threads of one process; only one process may write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._repaired: set[Path] = set()
        self._columns: list[str] | None = None
        self._listeners: dict[str, list[Callable[[Row], None]]] = {"event": [], "row": []}

    @classmethod
    def create(cls, path: Path, study_yaml: str) -> RunDir:
        """Start a new run folder holding the study as resolved.

        Raises:
            StoreError: the folder already holds a run, or its place is taken by a file.
        """
        path = Path(path)
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder._replace("study.yaml", study_yaml)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open a run folder, to read it or to go on writing where it ended.

        Raises:
            StoreError: there is no run in this folder.
        """
        path = Path(path)
        if not (path / "study.yaml").is_file():
            what = "holds no study.yaml, so it is not a run folder" if path.is_dir() else "does not exist"
            raise RunDirError(f"{path} {what}: `fedsigma runs` lists the run folders there are")
        return cls(path)

    @property
    def key(self) -> str:
        """What sites know this run by, 16 hex digits: made at first use and kept in the folder.

        Not its path's digest: a folder may be moved before it is gone on with, and another take its place.
        """
        if not (self.path / "key.txt").exists():
            self._replace("key.txt", secrets.token_hex(8))
        return (self.path / "key.txt").read_text(encoding="ascii").strip()

    @property
    def study_yaml(self) -> str:
        """The study as the server resolved it, as YAML text."""
        return (self.path / "study.yaml").read_text(encoding="utf-8")

    @property
    def report_path(self) -> Path:
        """Where the report of this run is, or will be."""
        return self.path / "report.html"

    @property
    def has_shift(self) -> bool:
        """Whether a round has produced a sigma shift yet."""
        return (self.path / "sigma.safetensors").is_file()

    # run.lock

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that writes this folder, until the end of the block or of the process.

        Raises:
            StoreError: another process does.
        """
        try:
            with lock.hold(self.path / "run.lock"):
                yield
        except lock.RunLocked:
            raise RunDirError(
                f"{self.path} is written by a run that still goes on: wait for its end, or stop it first"
            ) from None

    @property
    def locked(self) -> bool:
        """Whether a living process writes this folder, as far as its file system can tell (see `holding`)."""
        return lock.is_held(self.path / "run.lock")

    # events.jsonl

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append one event with the present time.

        Values may be numbers, text, lists and mappings; a number that is not finite is written as null.

        Raises:
            TypeError: a value cannot be written as JSON, or a field is named `time`.
        """
        if "time" in fields:
            raise TypeError(f"event {kind!r} has a field named time: the store sets the time itself")
        line = {"time": round(time.time(), 3), "kind": kind, **fields}
        text = json.dumps(_plain(line), ensure_ascii=True, allow_nan=False)
        with self._lock:
            self._append(self.path / "events.jsonl", text, keep_tail=_is_event)
            self._tell("event", line)

    def listen(
        self, event: Callable[[Row], None] | None = None, *, row: Callable[[Row], None] | None = None
    ) -> None:
        """Have each further event, or row of a round, told to someone else, too, after it was written.

        Listeners hear in the order in which they came. What one raises is raised to the writer, for a run may
        depend on being heard; and none may write into this folder while it is told.
        """
        for kind, listener in (("event", event), ("row", row)):
            if listener is not None:
                self._listeners[kind].append(listener)

    def _tell(self, kind: str, line: Row) -> None:
        for listener in self._listeners[kind]:
            listener(line)

    def events(self) -> list[Row]:
        """All events in the order they were written.

        A last line cut short by a crash is left out. A damaged line elsewhere appears as an event of kind
        `unreadable_line` with its line number, so that it can be noticed.
        """
        lines = read_lines(self.path / "events.jsonl")
        found: list[Row] = []
        for number, (text, whole) in enumerate(lines, start=1):
            if _is_event(text):
                found.append(json.loads(text))
            elif whole and text.strip():
                found.append({"time": None, "kind": "unreadable_line", "line": number})
        return found

    # rounds.csv

    def log_round(
        self,
        round: int,
        site: str,
        metrics: Mapping[str, float],
        bytes_up: int,
        bytes_down: int,
        status: str,
        reason: str = "",
    ) -> None:
        """Append what one site, or all sites `pooled`, did in one round.

        Units: bytes_up (site to server) and bytes_down (server to site) in bytes.

        Raises:
            ValueError: a metric's name is not a plain word, or clashes with a fixed column.
        """
        for name in metrics:
            if name in _FIXED or not _METRIC_NAME.fullmatch(name):
                raise ValueError(
                    f"metric {name!r} of site {site!r} cannot be a column of rounds.csv: "
                    f"expected letters, digits and _ . - and none of {', '.join(_FIXED)}"
                )
        row: Row = {"round": int(round), "site": site, "status": status, "reason": reason}
        row |= {"bytes_up": int(bytes_up), "bytes_down": int(bytes_down), **metrics}
        with self._lock:
            columns = self._columns_for(row)
            text = csv_line([cell(row.get(name)) for name in columns])
            self._append(self.path / "rounds.csv", text)
            self._tell("row", row)

    def rounds(self) -> list[Row]:
        """The rows of `rounds.csv` by round; of rows of one round and site, the one written last.

        Every row has the keys `round`, `site`, `status`, `bytes_up`, `bytes_down`, `reason` and every
        metric of the file, None where the site sent none.
        """
        header, rows = read_table(self.path / "rounds.csv")
        return latest_rows(parse_row(header, cells) for cells in rows)

    # shift_magnitude.jsonl

    def log_shift_magnitude(self, round: int, towers: Mapping[str, Any]) -> None:
        """Append where the shift that a round made is large: `heat.to_towers` of it."""
        text = json.dumps(_plain({"round": int(round), "towers": towers}), allow_nan=False)
        with self._lock:
            self._append(self.path / "shift_magnitude.jsonl", text, keep_tail=_is_heat)

    def shift_magnitudes(self) -> list[Row]:
        """The lines of `shift_magnitude.jsonl`, `round` and `towers`; the last of each round."""
        lines = [text for text, _ in read_lines(self.path / "shift_magnitude.jsonl") if _is_heat(text)]
        latest = {found["round"]: found for found in map(json.loads, lines)}
        return [latest[number] for number in sorted(latest)]

    # summary.json

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results of the run; numbers that are not finite become null."""
        self._replace("summary.json", json.dumps(_plain(summary), indent=2, ensure_ascii=False) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The results of the run; empty while there are none.

        Raises:
            StoreError: summary.json is not a JSON object.
        """
        path = self.path / "summary.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirError(f"{path} is not valid JSON ({error}): restore a copy or run again") from error
        if not isinstance(found, dict):
            raise RunDirError(f"{path} holds a {type(found).__name__}, expected an object: run again")
        return found

    # sigma.safetensors

    def save_shift(
        self,
        shift: Tensor | np.ndarray,
        *,
        layout_json: str,
        fingerprint_json: str,
        study_yaml: str,
        round: int,
        run: str = "",
    ) -> None:
        """Replace the run's sigma shift by the one this round made.

        Shapes: shift (layout size,).

        Raises:
            ArtefactError: the shift is not a finite vector.
        """
        from fedsigma.common.registry.shift_file import save_shift

        save_shift(
            self.path / "sigma.safetensors",
            shift,
            layout_json=layout_json,
            fingerprint_json=fingerprint_json,
            study_yaml=study_yaml,
            round=round,
            run=run,
        )

    def load_shift(self) -> SavedShift:
        """The sigma shift of the last finished round.

        Raises:
            ArtefactError: no round has produced one yet, or the file is damaged.
        """
        from fedsigma.common.registry.shift_file import load_shift

        return load_shift(self.path / "sigma.safetensors")

    # writing

    def _replace(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode("utf-8"))

    def _append(self, path: Path, text: str, *, keep_tail: Callable[[str], bool] | None = None) -> None:
        self._repair(path, keep_tail)
        append_line(path, text)

    def _repair(self, path: Path, keep_tail: Callable[[str], bool] | None) -> None:
        if path not in self._repaired:
            self._repaired.add(path)
            repair(path, keep_tail)

    def _columns_for(self, row: Row) -> list[str]:
        """The header of rounds.csv, after making sure that it has a column for everything in this row."""
        path = self.path / "rounds.csv"
        self._repair(path, None)
        if self._columns is None or not path.is_file():
            self._columns = read_table(path)[0] or None
        columns = self._columns or [*_FIXED[:-1], *METRIC_COLUMNS, _FIXED[-1]]
        wanted = [*columns, *(name for name in row if name not in columns)]
        if wanted != self._columns:
            # A metric not seen before: the whole table is written again with one more column.
            old = read_table(path)[1]
            lines = [wanted, *([*cells, *[""] * (len(wanted) - len(cells))] for cells in old)]
            self._replace("rounds.csv", "".join(csv_line(cells) + "\n" for cells in lines))
            self._columns = wanted
        return wanted


def check_free(path: Path) -> None:
    """See that a new run may have this folder.

    Raises:
        StoreError: it already holds a run, or its place is taken by a file.
    """
    if (path / "study.yaml").exists():
        raise RunDirError(
            f"{path} already holds a run: name another folder, or go on with that run by resume=true"
        )
    if path.exists() and not path.is_dir():
        raise RunDirError(f"{path} is a file, a run needs a folder: name another place")


def _plain(value: Any) -> Any:
    """A copy of the value in JSON's own types; scalars of numpy and torch become numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars alike
        return _plain(value.tolist())
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON: give numbers or text")


def _is_event(text: str) -> bool:
    return as_object(text, kind=str) is not None


def _is_heat(text: str) -> bool:
    return as_object(text, round=int, towers=dict) is not None


def latest_rows(rows: Iterable[Row | None]) -> list[Row]:
    """The rows by round; of rows of one round and site, the one written last. None are damaged ones."""
    latest = {(row["round"], row["site"]): row for row in rows if row is not None}
    return sorted(latest.values(), key=lambda row: row["round"])


def parse_row(header: list[str], cells: list[str]) -> Row | None:
    """One row with its numbers as numbers, or None if it is damaged."""
    if len(cells) != len(header):
        return None
    row: Row = dict.fromkeys(header)
    try:
        for name, text in zip(header, cells, strict=True):
            if name in _TEXT:
                row[name] = text
            elif text:
                number = float(text)
                if math.isfinite(number):
                    row[name] = int(number) if name in _WHOLE else number
    except ValueError:
        return None
    complete = all(row.get(name) is not None for name in _FIXED)
    return row if complete else None
