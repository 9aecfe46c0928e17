"""Pictures in folders: one sub-folder per class, or train and test folders of such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from fedsigma.common.data.records import DataError, PictureSource, Problem, Record, is_hidden, read_split
from fedsigma.common.data.sources.registry import register_source

__all__ = ["SUFFIXES", "open_folder", "walk_classes"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"})


@register_source("folder")
def open_folder(path: Path, *, group_by_folder: bool = True) -> PictureSource:
    """Open `CLASS/picture`, `SPLIT/CLASS/picture` or either with folders of patients below the class.

    Args:
        path: the top folder.
        group_by_folder: whether pictures in one folder below a class folder are one group (a patient), so
            that they are never divided between train and test; the same name in two classes is one group.

    Raises:
        DataError: it is no folder, or holds no picture in a class folder.
    """
    records, problems = walk_classes(path, lambda file: file.suffix.lower() in SUFFIXES, group_by_folder)
    if not records:
        raise DataError(
            f"the folder {path} has no pictures in class folders: expected CLASS/picture.png or "
            f"train/CLASS/picture.png, of {', '.join(sorted(SUFFIXES))}; for DICOM write dicom:PATH"
        )
    return PictureSource(records, lambda key: Image.open(path / key), problems)


def walk_classes(
    path: Path, wanted: Callable[[Path], bool], group_by_folder: bool
) -> tuple[list[Record], list[Problem]]:
    """List the wanted files of a tree of class folders, sorted, and what lies beside them.

    Raises:
        DataError: it is no folder.
    """
    if not path.is_dir():
        raise DataError(f"{path} is a file, expected a folder with one folder per class")
    tops = sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p.relative_to(path)))
    split_tops = bool(tops) and all(_is_split(top.name) for top in tops)
    records = []
    for top in tops:
        split = read_split(top.name) if split_tops else None
        if not split_tops:
            classes = [top]
        else:
            classes = sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in classes:
            for file in _files(folder, wanted):
                inner = file.relative_to(folder).parent
                group = inner.as_posix() if group_by_folder and inner.parts else None
                key = file.relative_to(path).as_posix()
                records.append(Record(key=key, label=folder.name, group=group, split=split))
    outside = [*_loose(path, wanted), *(f for top in tops if split_tops for f in _loose(top, wanted))]
    problems = [
        Problem(
            kind="unknown label",
            where=file.relative_to(path).as_posix(),
            detail="lies in no class folder",
        )
        for file in outside
    ]
    return records, problems


def _is_split(name: str) -> bool:
    try:
        return read_split(name) is not None
    except DataError:
        return False


def _files(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if wanted(file) and not is_hidden(file.relative_to(folder)) and file.is_file():
            yield file


def _loose(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".") and wanted(f))
