"""What a data source is: a list of records and a way to decode one picture at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "SPLITS",
    "DataError",
    "MissingPicture",
    "PictureError",
    "PictureSource",
    "Problem",
    "Record",
    "SiteRow",
    "Source",
    "UnsupportedPicture",
    "read_split",
    "read_text",
    "site_table",
    "to_rgb",
]

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class DataError(FedSigmaError, ValueError):
    """A data source cannot be used as asked. The text may hold file names: it stays at the site."""


class PictureError(DataError):
    """One picture cannot be decoded."""


class MissingPicture(PictureError):
    """One picture's file does not exist."""


class UnsupportedPicture(PictureError):
    """One picture is intact but of a kind that is not read, such as a DICOM file of many frames."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture of a source, not decoded.

    Fields: key, which finds the picture in its source and never leaves the site; label, the class as the
    source writes it; site, the hospital or laboratory; group, what must not be divided between train and
    test (a patient, a lesion; None: the picture alone); split, 'train', 'val', 'test', or None if open.
    """

    key: str
    label: str | None = None
    site: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a source. `where` (a file, row, class or group) and `detail` stay at the site."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


class Source(Protocol):
    """A set of pictures that are decoded one at a time."""

    records: list[Record]
    problems: list[Problem]

    def image(self, record: Record) -> Image.Image:
        """Decode one picture as RGB."""
        ...


@dataclass
class PictureSource:
    """A source made of records and a function that decodes the picture of a key.

    Fields: records; reader, from a key to a picture of any mode; problems, found while opening, each of
    which has left no record; classes, in the order of the set's own label numbers, where it has such; parts,
    those of the split that were asked for.
    """

    records: list[Record]
    reader: Callable[[str], Image.Image]
    problems: list[Problem] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    parts: Sequence[str] = SPLITS

    def image(self, record: Record) -> Image.Image:
        """Decode one picture as RGB, upright, in its own size.

        Raises:
            MissingPicture: there is no such file.
            UnsupportedPicture: it is of a kind that is not read.
            PictureError: it cannot be decoded.
        """
        try:
            return to_rgb(self.reader(record.key))
        except PictureError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingPicture(f"{record.key}: no such file") from error
        except Image.DecompressionBombError as error:
            raise UnsupportedPicture(
                f"{record.key}: too many pixels ({error}); make a smaller copy"
            ) from error
        except UnidentifiedImageError as error:
            raise PictureError(f"{record.key}: not a picture that can be read") from error
        # A damaged file makes decoders fail in any of these ways.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError) as error:
            raise PictureError(f"{record.key}: {error or type(error).__name__}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turn a picture of any mode into upright RGB.

    Transparent pixels become white. Pictures of more than 8 bits are stretched from their own least to their
    greatest value, since the range that they use is not written in the file.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB":
        picture.load()
        return picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def read_split(word: str | None) -> str | None:
    """Read a split's name as people write it: `Training` is 'train', nothing is None.

    Raises:
        DataError: it is no known split.
    """
    word = (word or "").strip()
    if not word:
        return None
    if word.casefold() not in _SPLIT_WORDS:
        raise DataError(f"split is {word!r}, expected one of {', '.join(SPLITS)}, or nothing")
    return _SPLIT_WORDS[word.casefold()]


def read_text(value: object) -> str | None:
    """Read a cell as text without surrounding blanks; an empty cell is None."""
    text = "" if value is None or value != value else str(value).strip()
    return text or None


@dataclass(frozen=True)
class SiteRow:
    """Number of pictures of one class at one site, by split; `unsplit` counts those without a split."""

    site: str
    label: str
    train: int = 0
    val: int = 0
    test: int = 0
    unsplit: int = 0


def site_table(records: Iterable[Record], classes: Sequence[str] | None = None) -> list[SiteRow]:
    """Count pictures by site, class and split, for display.

    Args:
        records: any records.
        classes: rows wanted for every site, in this order, also where a site has none; without it, the
            labels that occur.
    """
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for record in records:
        row = counts.setdefault((record.site or "-", record.label or "-"), {})
        name = record.split or "unsplit"
        row[name] = row.get(name, 0) + 1
    labels = list(classes) if classes is not None else sorted({label for _, label in counts})
    sites = sorted({site for site, _ in counts})
    return [SiteRow(site, label, **counts.get((site, label), {})) for site in sites for label in labels]


def is_hidden(path: PurePath) -> bool:
    """Tell whether a path has a part that starts with a dot (`.DS_Store`, `._x.jpg`)."""
    return any(part.startswith(".") for part in path.parts)
