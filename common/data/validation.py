"""Validation of a data source before a study: one report of all problems."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsigma.common.data.records import (
    SPLITS,
    DataError,
    MissingPicture,
    PictureError,
    Problem,
    Record,
    Source,
    UnsupportedPicture,
    site_table,
)
from fedsigma.common.data.sampling import group_of, safest_split

__all__ = ["KINDS", "ValidationReport", "check_source"]

# Kinds of problem in the order of the report, with the next step for each.
KINDS = {
    "unreadable row": "repair the row",
    "missing file": "restore the file, or remove the row",
    "corrupt picture": "copy it again from its origin, or remove it",
    "unsupported picture": "convert it, or remove it",
    "unknown label": "correct it, add the class to the study, or map it with the option labels",
    "unknown split": "write train, val, test or nothing",
    "listed twice": "keep one row; the first is used",
    "identical pictures": "correct the label; keep a picture in one split only",
    "group in two splits": "give a group one split; only the test part of these groups is used",
    "empty class": "add pictures, or leave the class to other sites",
    "empty split": "add pictures, or leave the split empty to have it made",
}


@dataclass(frozen=True)
class ValidationReport:
    """The problems of a data source. Only `counts()` may leave the site: texts name files and groups.

    Attributes:
        problems: The problems, in the order of KINDS.
        usable: The records that can be used nevertheless.
        total: Number of records before validation.
        classes: Classes of the study.
    """

    problems: tuple[Problem, ...]
    usable: tuple[Record, ...]
    total: int
    classes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def counts(self) -> dict[str, int]:
        """Return the number of problems of each kind; contains no name of a file, patient or class."""
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    def require_usable(self, on_problem: str) -> list[Record]:
        """Return the usable records.

        Args:
            on_problem: 'stop' raises if there are problems, 'skip' continues with the usable records.

        Raises:
            DataError: There are problems and on_problem is 'stop', or no record is usable.
        """
        if on_problem not in ("stop", "skip"):
            raise DataError(f"on_problem is {on_problem!r}, expected 'stop' or 'skip'")
        if self.problems and on_problem == "stop":
            raise DataError(f"the data have problems; repair them, or set on_problem: skip\n{self.to_text()}")
        if not self.usable:
            raise DataError(f"no picture can be used\n{self.to_text()}")
        return list(self.usable)

    def to_text(self, rows: int = 10) -> str:
        """Return the report as plain text with at most `rows` problems of each kind."""
        lines = []
        for kind, count in self.counts().items():
            problems = [problem for problem in self.problems if problem.kind == kind]
            lines.append(f"{kind} ({count}): {KINDS[kind]}")
            lines += [f"  {problem.where}: {problem.detail}" for problem in problems[:rows]]
            lines += [f"  ... and {count - rows} more"] * (count > rows)
        table = site_table(self.usable, self.classes)
        splits = [name for name in (*SPLITS, "unsplit") if any(getattr(row, name) for row in table)]
        cells = [["site", "class", *splits]]
        cells += [[row.site, row.label, *(str(getattr(row, name)) for name in splits)] for row in table]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rendered = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([*lines, "", *rendered, "", self.headline()]).lstrip("\n")

    def headline(self) -> str:
        """Return the number of usable records and of problems as one sentence."""
        number = len(self.problems)
        problems = "1 problem" if number == 1 else f"{number or 'no'} problems"
        return f"{len(self.usable)} of {self.total} records can be used; {problems} found."


def check_source(
    source: Source,
    *,
    classes: Sequence[str] | None = None,
    pictures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Check every record of a source, and decode every picture once.

    Args:
        source: The source.
        classes: Classes of the study; None for all labels that occur.
        pictures: Whether to decode the pictures; otherwise damaged and missing files are not detected.
        progress: Called after each picture with the number done and the total number.
    """
    records, problems = list(source.records), list(source.problems)
    expected = list(classes) if classes is not None else sorted({r.label for r in records if r.label})
    total = len(records) + len(problems)
    records = _drop_unknown_labels(records, expected, problems)
    records = _drop_duplicates(records, problems)
    if pictures:
        records = _drop_undecodable(source, records, problems, progress)
    records = _drop_divided_groups(records, problems)
    _report_empty(records, expected, getattr(source, "parts", SPLITS), problems)
    problems.sort(key=lambda problem: list(KINDS).index(problem.kind))
    return ValidationReport(tuple(problems), tuple(records), total, tuple(expected))


def _drop_unknown_labels(records: list[Record], classes: list[str], problems: list[Problem]) -> list[Record]:
    for record in records:
        if record.label in classes:
            continue
        near = difflib.get_close_matches(record.label or "", classes, n=1, cutoff=0.6)
        hint = f", did you mean '{near[0]}'?" if near else f", expected one of {', '.join(classes)}"
        detail = f"label is '{record.label}'{hint}" if record.label else "has no label"
        problems.append(Problem(kind="unknown label", where=record.key, detail=detail))
    return [record for record in records if record.label in classes]


def _drop_duplicates(records: list[Record], problems: list[Problem]) -> list[Record]:
    unique: dict[str, Record] = {}
    for record in records:
        first = unique.setdefault(record.key, record)
        if first is not record:
            how = "alike" if first == record else f"as '{first.label}' and as '{record.label}'"
            problems.append(Problem(kind="listed twice", where=record.key, detail=f"listed {how}"))
    return list(unique.values())


def _drop_undecodable(
    source: Source,
    records: list[Record],
    problems: list[Problem],
    progress: Callable[[int, int], None] | None,
) -> list[Record]:
    """Drop pictures that cannot be decoded, and training copies of pictures in other splits."""
    decoded: list[Record] = []
    copies_of: dict[bytes, list[Record]] = defaultdict(list)
    for number, record in enumerate(records, 1):
        try:
            picture = source.image(record)
            digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            copies_of[digest].append(record)
            decoded.append(record)
        except PictureError as error:
            kinds = {MissingPicture: "missing file", UnsupportedPicture: "unsupported picture"}
            kind = kinds.get(type(error), "corrupt picture")
            detail = str(error).removeprefix(f"{record.key}: ")
            problems.append(Problem(kind=kind, where=record.key, detail=detail))
        if progress is not None:
            progress(number, len(records))
    dropped: set[str] = set()
    for copies in copies_of.values():
        labels, splits = sorted({str(r.label) for r in copies}), {r.split for r in copies}
        if len(labels) == 1 and len(splits) == 1:
            continue
        names = ", ".join(r.key for r in copies[1:4]) + (", ..." if len(copies) > 4 else "")
        reason = f"labels {' and '.join(labels)}" if len(labels) > 1 else "in more than one split"
        detail = f"same as {names}: {reason}"
        problems.append(Problem(kind="identical pictures", where=copies[0].key, detail=detail))
        split = safest_split(splits)
        dropped |= {r.key for r in copies if len(labels) > 1 or r.split != split}
    return [record for record in decoded if record.key not in dropped]


def _drop_divided_groups(records: list[Record], problems: list[Problem]) -> list[Record]:
    """Report groups in two splits; of these groups keep only the test part."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[group_of(record)].append(record)
    split_of: dict[tuple[str, str], str | None] = {}
    for name, members in groups.items():
        counts = Counter(record.split for record in members if record.split)
        if len(counts) > 1:
            detail = "has " + " and ".join(f"{counts[split]} in {split}" for split in SPLITS if counts[split])
            problems.append(Problem(kind="group in two splits", where=name[1], detail=detail))
            split_of[name] = safest_split(counts)
    return [r for r in records if group_of(r) not in split_of or r.split in (None, split_of[group_of(r)])]


def _report_empty(
    records: list[Record], classes: list[str], parts: Sequence[str], problems: list[Problem]
) -> None:
    """Report classes without a training picture, and selected splits without a picture."""
    for label in classes:
        splits = {record.split for record in records if record.label == label}
        if splits.isdisjoint(("train", None)):
            detail = "has no picture to train on" if splits else "has no usable picture"
            problems.append(Problem(kind="empty class", where=label, detail=detail))
    if not records:
        return
    present = {record.split for record in records}
    for split in ("train", "test"):
        if split in parts and None not in present and split not in present:
            problems.append(Problem(kind="empty split", where=split, detail="has no usable picture"))
    open_groups = {group_of(record) for record in records if record.split is None}
    if "test" not in present and len(open_groups) == 1 and len(records) > 1:
        detail = "all pictures without a split are one group: none can be kept for testing"
        problems.append(Problem(kind="empty split", where="test", detail=detail))
