"""Pictures in folders: one sub-folder per class, optionally below train, val and test folders."""

from __future__ import annotations

from collections.abc import Callable
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
        path: The top folder.
        group_by_folder: Whether pictures in one folder below a class folder are one group (a patient), which
            is never divided between train and test; the same name in two classes is one group.

    Raises:
        DataError: The path is not a folder, or contains no picture in a class folder.
    """
    records, problems = walk_classes(path, lambda file: file.suffix.lower() in SUFFIXES, group_by_folder)
    if not records:
        raise DataError(
            f"the folder {path} has no pictures in class folders: expected CLASS/picture.png or "
            f"train/CLASS/picture.png, of {', '.join(sorted(SUFFIXES))}; for DICOM write dicom:PATH"
        )
    return PictureSource(records, lambda key: Image.open(path / key), problems)


def walk_classes(
    path: Path, is_picture: Callable[[Path], bool], group_by_folder: bool
) -> tuple[list[Record], list[Problem]]:
    """List the pictures of a tree of class folders, sorted, and a problem for each picture outside of them.

    Raises:
        DataError: The path is not a folder.
    """
    if not path.is_dir():
        raise DataError(f"{path} is a file, expected a folder with one folder per class")
    tops = _subfolders(path)
    has_splits = bool(tops) and all(_is_split(top.name) for top in tops)
    records: list[Record] = []
    outside = _pictures(path, is_picture, "*")
    for top in tops:
        split = read_split(top.name) if has_splits else None
        if has_splits:
            outside += _pictures(top, is_picture, "*")
        for folder in _subfolders(top) if has_splits else [top]:
            for file in _pictures(folder, is_picture, "**/*"):
                inner = file.relative_to(folder).parent
                group = inner.as_posix() if group_by_folder and inner.parts else None
                key = file.relative_to(path).as_posix()
                records.append(Record(key=key, label=folder.name, group=group, split=split))
    keys = [file.relative_to(path).as_posix() for file in outside]
    return records, [Problem(kind="unknown label", where=key, detail="is in no class folder") for key in keys]


def _is_split(name: str) -> bool:
    try:
        return read_split(name) is not None
    except DataError:
        return False


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path, is_picture: Callable[[Path], bool], pattern: str) -> list[Path]:
    files = (f for f in sorted(folder.glob(pattern)) if not is_hidden(f.relative_to(folder)))
    return [file for file in files if is_picture(file) and file.is_file()]
