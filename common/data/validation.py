"""One report that names everything wrong with a data source before a study starts."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from fedsigma.common.data.sampling import group_of

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["KINDS", "ValidationReport", "check_source"]

# Kinds of problem in the order of the report, with the next step for each.
KINDS = {
    "unreadable row": "repair the row",
    "missing file": "put the file back, or take the row out",
    "corrupt picture": "copy it again from where it came, or take it out",
    "unsupported picture": "convert it, or take it out",
    "unknown label": "correct it, add the class to the study, or name it by the option labels",
    "unknown split": "write train, val, test or nothing",
    "listed twice": "keep one row; the first is used",
    "identical pictures": "find out which label is right; keep a picture in one split only",
    "group in two splits": "give a group one split; of these groups only the test part is used",
    "empty class": "add pictures, or leave the class to other sites",
    "empty split": "add pictures, or leave the split open to have it made",
}


@dataclass(frozen=True)
class ValidationReport:
    """What a check found. Texts name files and groups: print them at the site, send only `counts()`.

    Fields: problems, in the order of KINDS; usable, the records that can be used in spite of them; total,
    the number of records before; classes, those of the study.
    """

    problems: tuple[Problem, ...]
    usable: tuple[Record, ...]
    total: int
    classes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def counts(self) -> dict[str, int]:
        """Number of problems of each kind that occurs; holds no name of a file, patient or class."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def require_usable(self, on_problem: str) -> list[Record]:
        """Return the usable records, or stop.

        Args:
            on_problem: 'stop' raises if anything is wrong, 'skip' goes on with what is usable.

        Raises:
            DataError: there are problems and the policy is 'stop', or nothing is usable.
        """
        if on_problem not in ("stop", "skip"):
            raise DataError(f"on_problem is {on_problem!r}, expected 'stop' or 'skip'")
        if self.problems and on_problem == "stop":
            raise DataError(f"the data have problems; mend them, or set on_problem: skip\n{self.to_text()}")
        if not self.usable:
            raise DataError(f"no picture can be used\n{self.to_text()}")
        return list(self.usable)

    def to_text(self, rows: int = 10) -> str:
        """Return the report as plain text, at most `rows` problems of each kind and a count of the rest."""
        lines = []
        for kind, shown, hidden in self._by_kind(rows):
            lines.append(f"{kind} ({len(shown) + hidden}): {KINDS[kind]}")
            lines += [f"  {problem.where}: {problem.detail}" for problem in shown]
            lines += [f"  ... and {hidden} more"] * (hidden > 0)
        cells = self._cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines += [
            "",
            *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells),
        ]
        lines += ["", self.headline()]
        return "\n".join(lines).lstrip("\n")

    def to_rich(self, rows: int = 10) -> Group:
        """Return the same report for a rich console."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Table | Text] = []
        for kind, shown, hidden in self._by_kind(rows):
            parts.append(
                Text(f"{kind} ({len(shown) + hidden})", style="bold red").append(f"  {KINDS[kind]}", "dim")
            )
            # Text, not markup: a file may be called [bold].
            parts += [Text(f"  {problem.where}: {problem.detail}") for problem in shown]
            parts += [Text(f"  ... and {hidden} more", style="dim")] * (hidden > 0)
        head, *body = self._cells()
        counts = Table(*head)
        for row in body:
            counts.add_row(*(Text(cell) for cell in row))
        return Group(*parts, counts, Text(self.headline(), style="green" if self.ok else "red"))

    def headline(self) -> str:
        """One sentence: how many records can be used, and how many problems there are."""
        number = len(self.problems)
        found = "no problems" if not number else "1 problem" if number == 1 else f"{number} problems"
        return f"{len(self.usable)} of {self.total} records can be used; {found} found."

    def _by_kind(self, rows: int) -> Iterable[tuple[str, list[Problem], int]]:
        for kind in self.counts():
            found = [problem for problem in self.problems if problem.kind == kind]
            yield kind, found[:rows], max(len(found) - rows, 0)

    def _cells(self) -> list[tuple[str, ...]]:
        table = site_table(self.usable, self.classes)
        names = [name for name in (*SPLITS, "unsplit") if any(getattr(row, name) for row in table)]
        rows = [(row.site, row.label, *(str(getattr(row, name)) for name in names)) for row in table]
        return [("site", "class", *names), *rows]


def check_source(
    source: Source,
    *,
    classes: Sequence[str] | None = None,
    pictures: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Check every record of a source, and decode every picture once.

    Args:
        source: an opened source.
        classes: the study's classes; without them, every label that occurs is a class.
        pictures: whether to decode the pictures; without it, damaged and missing files stay unnoticed.
        progress: called after each picture with the number done and the number in all.
    """
    records = list(source.records)
    wanted = list(classes) if classes is not None else sorted({r.label for r in records if r.label})
    found = list(getattr(source, "problems", []))
    total = len(records) + len(found)
    records = _labels(records, wanted, found)
    records = _twice(records, found)
    if pictures:
        records = _decode(source, records, found, progress)
    records = _divided(records, found)
    _empty(records, wanted, getattr(source, "parts", SPLITS), found)
    order = {kind: number for number, kind in enumerate(KINDS)}
    found.sort(key=lambda problem: order[problem.kind])
    return ValidationReport(tuple(found), tuple(records), total, tuple(wanted))


def _labels(records: list[Record], classes: list[str], found: list[Problem]) -> list[Record]:
    kept = []
    for record in records:
        if record.label in classes:
            kept.append(record)
            continue
        near = difflib.get_close_matches(record.label or "", classes, n=1, cutoff=0.6)
        hint = f", did you mean '{near[0]}'?" if near else f", expected one of {', '.join(classes)}"
        detail = f"label is '{record.label}'{hint}" if record.label else "has no label"
        found.append(Problem(kind="unknown label", where=record.key, detail=detail))
    return kept


def _twice(records: list[Record], found: list[Problem]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in records:
        if record.key in first:
            other = first[record.key]
            same = "alike" if other == record else f"as '{other.label}' and as '{record.label}'"
            found.append(Problem(kind="listed twice", where=record.key, detail=f"listed {same}"))
        else:
            first[record.key] = record
    return list(first.values())


def _decode(
    source: Source,
    records: list[Record],
    found: list[Problem],
    progress: Callable[[int, int], None] | None,
) -> list[Record]:
    """Leave out what cannot be decoded, and training copies of pictures that are seen elsewhere."""
    kept: list[Record] = []
    alike: dict[bytes, list[Record]] = defaultdict(list)
    for number, record in enumerate(records, 1):
        try:
            picture = source.image(record)
            alike[hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()].append(record)
            kept.append(record)
        except MissingPicture as error:
            found.append(Problem(kind="missing file", where=record.key, detail=_reason(error, record)))
        except UnsupportedPicture as error:
            found.append(Problem(kind="unsupported picture", where=record.key, detail=_reason(error, record)))
        except PictureError as error:
            found.append(Problem(kind="corrupt picture", where=record.key, detail=_reason(error, record)))
        if progress is not None:
            progress(number, len(records))
    dropped: set[str] = set()
    for copies in alike.values():
        labels, splits = sorted({str(r.label) for r in copies}), {r.split for r in copies}
        if len(labels) == 1 and len(splits) == 1:
            continue
        names = ", ".join(r.key for r in copies[1:4]) + (", ..." if len(copies) > 4 else "")
        why = f"labels {' and '.join(labels)}" if len(labels) > 1 else "in more than one split"
        found.append(
            Problem(kind="identical pictures", where=copies[0].key, detail=f"same as {names}: {why}")
        )
        best = _safest(r.split for r in copies)
        dropped |= {r.key for r in copies if len(labels) > 1 or r.split != best}
    return [record for record in kept if record.key not in dropped]


def _reason(error: PictureError, record: Record) -> str:
    return str(error).removeprefix(f"{record.key}: ")


def _safest(splits: Iterable[str | None]) -> str | None:
    """Choose the split to keep: a picture once used for testing is not to be trained on."""
    present = set(splits)
    return next((split for split in ("test", "val", "train") if split in present), None)


def _divided(records: list[Record], found: list[Problem]) -> list[Record]:
    """Report groups in two splits; of such a group keep only the test part."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[group_of(record)].append(record)
    kept_split: dict[tuple[str, str], str | None] = {}
    for name, members in groups.items():
        counts = Counter(record.split for record in members if record.split)
        if len(counts) > 1:
            told = " and ".join(f"{counts[split]} in {split}" for split in SPLITS if counts[split])
            found.append(Problem(kind="group in two splits", where=name[1], detail=f"has {told}"))
            kept_split[name] = _safest(counts)
    return [r for r in records if group_of(r) not in kept_split or r.split in (None, kept_split[group_of(r)])]


def _empty(records: list[Record], classes: list[str], parts: Sequence[str], found: list[Problem]) -> None:
    """Report classes without a picture to train on, and parts that were asked for and hold nothing."""
    for label in classes:
        splits = Counter(record.split for record in records if record.label == label)
        if not splits:
            found.append(Problem(kind="empty class", where=label, detail="has no usable picture"))
        elif not splits["train"] and not splits[None]:
            found.append(Problem(kind="empty class", where=label, detail="has no picture to train on"))
    if not records:
        return
    present = {record.split for record in records}
    for split in ("train", "test"):
        if split in parts and None not in present and split not in present:
            found.append(Problem(kind="empty split", where=split, detail="has no usable picture"))
    open_groups = {group_of(record) for record in records if record.split is None}
    if "test" not in present and len(open_groups) == 1 and len(records) > 1:
        detail = "all pictures without a split are one group: none can be kept for testing"
        found.append(Problem(kind="empty split", where="test", detail=detail))
