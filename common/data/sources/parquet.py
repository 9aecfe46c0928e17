"""Pictures in parquet files, as stored by Hugging Face datasets."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fedsigma.common.data.records import (
    DataError,
    MissingPicture,
    PictureSource,
    Problem,
    Record,
    read_split,
    read_text,
)
from fedsigma.common.data.sources.csv_manifest import column_names
from fedsigma.common.data.sources.registry import register_source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["COLUMNS", "open_parquet"]

COLUMNS = ("image", "label", "split", "group", "site")


@register_source("parquet")
def open_parquet(path: Path, *, columns: Mapping[str, str] | None = None) -> PictureSource:
    """Open one parquet file, or a folder of them, with the columns image, label and optional others.

    `image` is bytes of an encoded picture, or a struct of `bytes` and `path` (a file beside the parquet file,
    used where the bytes are empty). Integer labels take their names from the file's metadata. Pictures are
    read by row group when needed.

    Raises:
        DataError: The file is not parquet, lacks a column, or a column has the wrong type.
    """
    import pyarrow as pa

    names = column_names(columns, COLUMNS)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} holds no .parquet files")
    records: list[Record] = []
    problems: list[Problem] = []
    for file in files:
        try:
            _index(file, names, records, problems)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as parquet: {error}") from error
    return PictureSource(records, _Reader(path, names["image"]), problems)


def _index(file: Path, names: dict[str, str], records: list[Record], problems: list[Problem]) -> None:
    """Add one record for each row of a parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        for name in ("image", "label"):
            if names[name] not in schema.names:
                raise DataError(
                    f"{file} has no column '{names[name]}': it has {', '.join(schema.names)}; "
                    "rename it or name yours by the option columns"
                )
        _check_image(file, schema.field(names["image"]).type)
        small = [names[name] for name in COLUMNS[1:] if names[name] in schema.names]
        rows = table.read(columns=small).to_pylist()
    label_names = _label_names(schema, names["label"])
    for number, row in enumerate(rows):
        key, label = f"{file.name}#{number:08d}", row[names["label"]]
        if isinstance(label, int) and 0 <= label < len(label_names):
            label = label_names[label]
        cells = {name: read_text(row.get(names[name])) for name in ("site", "group", "split")}
        try:
            cells["split"] = read_split(cells["split"])
        except DataError as error:
            problems.append(Problem(kind="unknown split", where=key, detail=str(error)))
            continue
        records.append(Record(key=key, label=read_text(label), **cells))


def _check_image(file: Path, kind: pa.DataType) -> None:
    import pyarrow.types as pt

    is_bytes = pt.is_binary(kind) or pt.is_large_binary(kind)
    if not is_bytes and not (pt.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise DataError(
            f"{file}: the image column holds {kind}, expected bytes or a struct of bytes and path; "
            "if another column holds the pictures, name it by the option columns"
        )


def _label_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of integer labels from the metadata of Hugging Face datasets."""
    try:
        described: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = described["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError):
        return []


class _Reader:
    """Decodes the picture of a key; caches the encoded pictures of two row groups."""

    def __init__(self, path: Path, column: str) -> None:
        self.folder = path if path.is_dir() else path.parent
        self.column = column
        self._file = lru_cache(maxsize=16)(self._open)
        self._group = lru_cache(maxsize=2)(self._load)

    def __call__(self, key: str) -> Image.Image:
        name, _, number = key.rpartition("#")
        row, group = int(number), 0
        _, sizes = self._file(name)
        while row >= sizes[group]:
            row -= sizes[group]
            group += 1
        value = self._group(name, group)[row].as_py()
        if isinstance(value, dict):
            beside, value = value.get("path"), value["bytes"]
            if value is None and beside:
                return Image.open(self.folder / beside)
        if not value:
            raise MissingPicture(f"{key}: the row holds no picture")
        return Image.open(io.BytesIO(value))

    def _open(self, name: str) -> tuple[pq.ParquetFile, list[int]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.folder / name)
        return file, [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]

    def _load(self, name: str, group: int) -> pa.ChunkedArray:
        return self._file(name)[0].read_row_group(group, columns=[self.column])[self.column]
