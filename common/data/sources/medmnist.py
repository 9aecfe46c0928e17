"""MedMNIST and MedMNIST+ by the package medmnist, which has the names, and files that are here already."""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsigma.common.config.schema import did_you_mean
from fedsigma.common.data.catalog import Archive
from fedsigma.common.data.records import SPLITS, DataError, PictureSource, Record
from fedsigma.common.data.sources.registry import register_source

__all__ = ["SIZES", "medmnist_archive", "open_medmnist"]

SIZES = (28, 64, 128, 224)
"""Sides of the published pictures in pixels."""


@register_source("medmnist")
def open_medmnist(name: str, size: int = 28, *, root: str | None = None) -> PictureSource:
    """Open one set of two-dimensional pictures with one label each, by the package's own split.

    Nothing is downloaded: `fedsigma data fetch medmnist:NAME:SIZE FOLDER` does that. The pictures of a part
    are read into memory when its first is asked for.

    Args:
        name: as the package calls it, such as pathmnist.
        size: one of SIZES, in pixels.
        root: the folder of NAME.npz or NAME_SIZE.npz; without it, ~/.medmnist, the package's own.

    Raises:
        DataError: medmnist is not installed, there is no such set or file, or the file is not of its form.
    """
    about = _about(name, size)
    folder = Path(root).expanduser() if root else Path.home() / ".medmnist"
    file = folder / _file_name(name, size)
    if not file.is_file():
        raise DataError(f"{file} does not exist: run fedsigma data fetch medmnist:{name}:{size} {folder}")
    names = {int(number): str(label) for number, label in about["label"].items()}
    records = []
    for split in SPLITS:
        labels = _array(file, f"{split}_labels")
        if labels.ndim != 2 or labels.shape[1] != 1 or not np.isin(labels, list(names)).all():
            raise DataError(
                f"{file.name}: {split}_labels are not one of {len(names)} labels for each picture"
            )
        records += [
            Record(key=f"{split}/{place:06d}", label=names[int(number)], split=split)
            for place, number in enumerate(labels[:, 0])
        ]
    read = lru_cache(maxsize=len(SPLITS))(lambda split: _pictures(file, split, size))

    def picture(key: str) -> Image.Image:
        split, _, place = key.partition("/")
        return Image.fromarray(read(split)[int(place)])

    return PictureSource(records, picture, classes=tuple(names[number] for number in sorted(names)))


def medmnist_archive(name: str, size: int = 28) -> Archive:
    """The public file of a set, with the MD5 sum that the package states.

    Raises:
        DataError: as `open_medmnist`.
    """
    about, mark = _about(name, size), "" if size == 28 else f"_{size}"
    return Archive(
        url=about[f"url{mark}"], md5=about[f"MD5{mark}"], stated_by="the package medmnist", unpack=False
    )


def medmnist_licence(name: str) -> str:
    """The licence of a set, as the package states it.

    Raises:
        DataError: as `open_medmnist`.
    """
    return str(_about(name, SIZES[0])["license"])


def _about(name: str, size: int) -> dict[str, Any]:
    try:
        from medmnist import INFO
    except ImportError as error:
        raise DataError("reading MedMNIST needs medmnist: pip install 'fedsigma[medmnist]'") from error
    plain = {key: value for key, value in INFO.items() if not key.endswith("3d") and key != "chestmnist"}
    if name in INFO and name not in plain:
        raise DataError(f"{name} has volumes or several labels a picture, which a study cannot hold")
    if name not in plain:
        raise DataError(f"MedMNIST has no set '{name}'{did_you_mean(name, plain)}")
    if size not in SIZES:
        raise DataError(
            f"{name} has no pictures of {size} pixels: the sizes are {', '.join(map(str, SIZES))}"
        )
    return dict(plain[name])


def _file_name(name: str, size: int) -> str:
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def _array(file: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file.name} is no file of MedMNIST, or damaged: {name} cannot be read") from error


def _pictures(file: Path, split: str, size: int) -> NDArray[np.uint8]:
    found = _array(file, f"{split}_images")
    if found.dtype != np.uint8 or found.shape[1:] not in ((size, size), (size, size, 3)):
        raise DataError(
            f"{file.name}: {split}_images are {found.dtype} {found.shape[1:]}, expected uint8 of {size}"
        )
    return found
