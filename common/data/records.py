"""Records of a data source, and the decoding of its pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
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
    "is_hidden",
    "read_split",
    "read_text",
    "site_table",
    "to_rgb",
]

SPLITS = ("train", "val", "test")
_SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


class DataError(FedSigmaError, ValueError):
    """A data source is invalid. The message may contain file names, so it must not leave the site."""


class PictureError(DataError):
    """A picture cannot be decoded."""


class MissingPicture(PictureError):
    """The file of a picture does not exist."""


class UnsupportedPicture(PictureError):
    """A picture is intact but of an unsupported kind, such as a multi-frame DICOM file."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A picture of a source, not decoded.

    Attributes:
        key: Finds the picture in its source; never leaves the site.
        label: Class as the source writes it.
        site: Hospital or laboratory.
        group: Patient or lesion, never divided between train and test; None for the picture alone.
        split: 'train', 'val', 'test', or None if open.
    """

    key: str
    label: str | None = None
    site: str | None = None
    group: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem of a source; it must not leave the site.

    Attributes:
        kind: Kind of the problem, a key of `validation.KINDS`.
        where: File, row, class or group.
        detail: What is wrong.
    """

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


class Source(Protocol):
    """Pictures that are decoded one at a time."""

    records: list[Record]
    problems: list[Problem]

    def image(self, record: Record) -> Image.Image:
        """Decode a picture as RGB."""
        ...


@dataclass
class PictureSource:
    """A source made of records and a function that decodes the picture of a key.

    Attributes:
        records: The records.
        reader: Decodes the picture of a key, in any mode.
        problems: Problems found while opening; none of them has a record.
        classes: Classes in the order of the set's own label numbers, if it has such an order.
        parts: The selected splits.
    """

    records: list[Record]
    reader: Callable[[str], Image.Image]
    problems: list[Problem] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    parts: Sequence[str] = SPLITS

    def image(self, record: Record) -> Image.Image:
        """Decode a picture as upright RGB in its own size.

        Raises:
            MissingPicture: The file does not exist.
            UnsupportedPicture: The picture is of an unsupported kind.
            PictureError: The picture cannot be decoded.
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
            raise PictureError(f"{record.key}: not a picture, or of an unknown format") from error
        # Decoders raise any of these for a damaged file.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError) as error:
            raise PictureError(f"{record.key}: {error or type(error).__name__}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to upright RGB.

    Transparent pixels become white. Pictures of more than 8 bits are stretched from their minimum to their
    maximum, because the file does not contain the range in use.
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


def read_split(text: str | None) -> str | None:
    """Parse the name of a split: `Training` is 'train', an empty text is None.

    Raises:
        DataError: The split is unknown.
    """
    name = (text or "").strip().casefold()
    if name and _SPLIT_ALIASES.get(name, name) not in SPLITS:
        raise DataError(f"split is {(text or '').strip()!r}, expected one of {', '.join(SPLITS)}, or nothing")
    return _SPLIT_ALIASES.get(name, name) or None


def read_text(value: object) -> str | None:
    """Return a cell as stripped text; None for an empty cell."""
    text = "" if value is None or value != value else str(value).strip()
    return text or None


@dataclass(frozen=True)
class SiteRow:
    """Number of pictures of one class at one site, by split.

    Attributes:
        site: Name of the site.
        label: Class.
        train: Training pictures.
        val: Validation pictures.
        test: Test pictures.
        unsplit: Pictures without a split.
    """

    site: str
    label: str
    train: int = 0
    val: int = 0
    test: int = 0
    unsplit: int = 0


def site_table(records: Iterable[Record], classes: Sequence[str] | None = None) -> list[SiteRow]:
    """Count pictures by site, class and split.

    Args:
        records: The records.
        classes: Classes shown for every site, in this order; None for the labels that occur.
    """
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.site or "-", record.label or "-"][record.split or "unsplit"] += 1
    labels = list(classes) if classes is not None else sorted({label for _, label in counts})
    sites = sorted({site for site, _ in counts})
    return [SiteRow(site, label, **counts[site, label]) for site in sites for label in labels]


def is_hidden(path: PurePath) -> bool:
    """Tell whether a path has a part that starts with a dot (`.DS_Store`, `._x.jpg`)."""
    return any(part.startswith(".") for part in path.parts)
