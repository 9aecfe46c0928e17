"""Decoded examples: small tensors of the pictures that a site uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedsigma.common.data.records import DataError, Record, Source

__all__ = ["Example", "SiteData", "load_examples", "to_tensor"]


@dataclass(frozen=True)
class Example:
    """A decoded picture.

    Attributes:
        image: uint8 of shape (3, height, width).
        label: Index of the class.
        group: Group of the record.
    """

    image: Tensor
    label: int
    group: str | None


@dataclass(frozen=True)
class SiteData:
    """The images of one site.

    Attributes:
        name: Name of the site.
        train: Training examples.
        test: Test examples.
    """

    name: str
    train: list[Example]
    test: list[Example]


def load_examples(
    source: Source, records: Sequence[Record], classes: Sequence[str], *, side: int
) -> list[Example]:
    """Decode pictures, shrink large ones, and number their labels.

    Args:
        source: The source of the records.
        records: The pictures to decode, in the order of the result.
        classes: Class names; an example's label is the index of its class.
        side: Largest length of the shorter side in pixels; larger pictures are shrunk (antialiased bicubic).

    Raises:
        PictureError: A picture cannot be decoded.
        DataError: A label is not one of the classes, or side is below 1.
    """
    if side < 1:
        raise DataError(f"side is {side}, expected at least 1 pixel")
    numbers = {label: number for number, label in enumerate(classes)}
    examples: dict[int, Example] = {}
    # In the order of the source, because parquet files are read by row group.
    for position, record in sorted(enumerate(records), key=lambda item: item[1].key):
        if record.label not in numbers:
            raise DataError(f"{record.key}: label {record.label!r} is none of {', '.join(classes)}")
        image = to_tensor(source.image(record), side=side)
        examples[position] = Example(image, numbers[record.label], record.group)
    return [examples[position] for position in range(len(records))]


def to_tensor(picture: Image.Image, *, side: int) -> Tensor:
    """Return an RGB picture as uint8 (3, height, width), its shorter side at most `side` pixels."""
    if min(picture.size) > side:
        width, height = (max(side, round(length * side / min(picture.size))) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    # A copy, because torch needs writable memory.
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
