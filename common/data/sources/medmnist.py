"""MedMNIST and MedMNIST+, described by the package medmnist and read from local files."""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsigma.common.config.schema import did_you_mean
from fedsigma.common.data.catalog.card import Archive
from fedsigma.common.data.records import SPLITS, DataError, PictureSource, Record
from fedsigma.common.data.sources.registry import register_source

__all__ = ["SIZES", "medmnist_archive", "medmnist_licence", "open_medmnist"]

SIZES = (28, 64, 128, 224)
"""Sides of the published pictures in pixels."""


@register_source("medmnist")
def open_medmnist(name: str, size: int = 28, *, root: str | None = None) -> PictureSource:
    """Open a set of two-dimensional pictures with one label each and the package's own split.

    Nothing is downloaded: `fedsigma data fetch medmnist:NAME:SIZE FOLDER` does that. The pictures of a split
    are read into memory when the first of them is needed.

    Args:
        name: Name of the set in the package, such as pathmnist.
        size: One of SIZES, in pixels.
        root: Folder of NAME.npz or NAME_SIZE.npz; default: ~/.medmnist, as in the package.

    Raises:
        DataError: medmnist is not installed, there is no such set or file, or the file is invalid.
    """
    info = _set_info(name, size)
    folder = Path(root).expanduser() if root else Path.home() / ".medmnist"
    file = folder / f"{name}{_size_suffix(size)}.npz"
    if not file.is_file():
        raise DataError(f"{file} does not exist: run fedsigma data fetch medmnist:{name}:{size} {folder}")
    names = {int(number): str(label) for number, label in info["label"].items()}
    records = []
    for split in SPLITS:
        labels = _read_array(file, f"{split}_labels")
        if labels.ndim != 2 or labels.shape[1] != 1 or not np.isin(labels, list(names)).all():
            raise DataError(
                f"{file.name}: {split}_labels are not one of {len(names)} labels for each picture"
            )
        records += [
            Record(key=f"{split}/{row:06d}", label=names[int(number)], split=split)
            for row, number in enumerate(labels[:, 0])
        ]

    @lru_cache(maxsize=len(SPLITS))
    def read_pictures(split: str) -> NDArray[np.uint8]:
        pictures = _read_array(file, f"{split}_images")
        if pictures.dtype != np.uint8 or pictures.shape[1:] not in ((size, size), (size, size, 3)):
            raise DataError(
                f"{file.name}: {split}_images are {pictures.dtype} {pictures.shape[1:]},"
                f" expected uint8 of {size}"
            )
        return pictures

    def read_picture(key: str) -> Image.Image:
        split, _, row = key.partition("/")
        return Image.fromarray(read_pictures(split)[int(row)])

    return PictureSource(records, read_picture, classes=tuple(names[number] for number in sorted(names)))


def medmnist_archive(name: str, size: int = 28) -> Archive:
    """Return the public file of a set, with the MD5 sum that the package states."""
    info, suffix = _set_info(name, size), _size_suffix(size)
    return Archive(
        url=info[f"url{suffix}"], md5=info[f"MD5{suffix}"], stated_by="the package medmnist", unpack=False
    )


def medmnist_licence(name: str) -> str:
    """Return the licence of a set, as the package states it."""
    return str(_set_info(name, SIZES[0])["license"])


def _set_info(name: str, size: int) -> dict[str, Any]:
    try:
        from medmnist import INFO
    except ImportError as error:
        raise DataError("reading MedMNIST needs medmnist: pip install 'fedsigma[medmnist]'") from error
    supported = {key: value for key, value in INFO.items() if not key.endswith("3d") and key != "chestmnist"}
    if name in INFO and name not in supported:
        raise DataError(f"{name} has volumes or several labels a picture, which studies do not support")
    if name not in supported:
        raise DataError(f"MedMNIST has no set '{name}'{did_you_mean(name, supported)}")
    if size not in SIZES:
        raise DataError(
            f"{name} has no pictures of {size} pixels: the sizes are {', '.join(map(str, SIZES))}"
        )
    return dict(supported[name])


def _size_suffix(size: int) -> str:
    return "" if size == 28 else f"_{size}"


def _read_array(file: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file.name} is not a file of MedMNIST, or damaged: {name} cannot be read"
        ) from error
