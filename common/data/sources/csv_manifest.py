"""CSV manifests: one row per picture, with its path, label and optionally split, group and site."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from fedsigma.common.data.records import DataError, PictureSource, Problem, Record, read_split, read_text
from fedsigma.common.data.sources.registry import register_source

__all__ = ["COLUMNS", "column_names", "open_manifest", "read_manifest"]

COLUMNS = ("path", "label", "split", "group", "site")


@register_source("csv")
def open_manifest(path: Path, *, columns: Mapping[str, str] | None = None) -> PictureSource:
    """Open a CSV file with the columns path, label and, optionally, split, group and site.

    Args:
        path: The manifest; relative paths in it start from its folder.
        columns: Other names of the columns, such as `{label: diagnosis}`.

    Raises:
        DataError: The file is not readable as CSV, or lacks a column.
    """
    records, problems = read_manifest(path, columns)
    return PictureSource(records, lambda key: Image.open(path.parent / key), problems)


def column_names(columns: Mapping[str, str] | None, known: tuple[str, ...]) -> dict[str, str]:
    """Return the name of each known column in a file, by the option columns."""
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"the option columns is {columns!r}, expected a table such as {{label: diagnosis}}")
    for name in columns or {}:
        if name not in known:
            raise DataError(f"the option columns names {name!r}: known are {', '.join(known)}")
    return {name: str((columns or {}).get(name, name)) for name in known}


def read_manifest(path: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Record], list[Problem]]:
    """Read a manifest as `open_manifest`; an invalid row becomes a problem."""
    names = column_names(columns, COLUMNS)
    records: list[Record] = []
    problems: list[Problem] = []
    for number, row in _read_rows(path, names):
        where = f"{path.name} row {number}"
        cells = {name: read_text(row.get(names[name])) for name in COLUMNS}
        key = cells.pop("path")
        if None in row:
            detail = "has more cells than the header: put text with a comma in quotes"
            problems.append(Problem(kind="unreadable row", where=where, detail=detail))
        elif key is None:
            problems.append(Problem(kind="missing file", where=where, detail="names no file"))
        else:
            try:
                records.append(Record(key=key, **cells | {"split": read_split(cells["split"])}))
            except DataError as error:
                problems.append(Problem(kind="unknown split", where=f"{where} ({key})", detail=str(error)))
    if not records and not problems:
        raise DataError(f"the manifest {path} has a header and no rows")
    return records, problems


def _read_rows(path: Path, names: Mapping[str, str]) -> Iterator[tuple[int, dict[str | None, str]]]:
    """Yield each row of a CSV file with its line number; `;` and tab are delimiters too."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a byte-order mark
            header = stream.readline()
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=max(",;\t", key=header.count))
            present = [name.strip() for name in reader.fieldnames or []]
            for name in ("path", "label"):
                if names[name] not in present:
                    raise DataError(
                        f"the manifest {path} lacks the column '{names[name]}', has {', '.join(present)}; "
                        "rename it or name yours by the option columns"
                    )
            reader.fieldnames = present
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"the manifest {path} is not UTF-8 text: save it as 'CSV UTF-8'") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"the manifest {path} cannot be read: {error}") from error
