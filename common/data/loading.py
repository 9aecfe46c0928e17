"""Decoded examples: small tensors of the pictures that a site really uses."""

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
    """One decoded picture. image: uint8 (3, height, width); label: index of the class; group: as recorded."""

    image: Tensor
    label: int
    group: str | None


@dataclass(frozen=True)
class SiteData:
    """What one site trains on and is tested on."""

    name: str
    train: list[Example]
    test: list[Example]


def load_examples(
    source: Source, records: Sequence[Record], classes: Sequence[str], *, side: int
) -> list[Example]:
    """Decode pictures, shrink large ones, and number their labels.

    Args:
        source: where the records come from.
        records: the pictures wanted; the result keeps their order.
        classes: names of the classes; a label's index in it is the example's label.
        side: greatest length of the shorter side in pixels; larger pictures are shrunk (antialiased bicubic),
            smaller ones stay.

    Raises:
        PictureError: a picture cannot be decoded.
        DataError: a label is not among the classes, or side is below 1.
    """
    if side < 1:
        raise DataError(f"side is {side}, expected at least 1 pixel")
    numbers = {label: number for number, label in enumerate(classes)}
    examples: dict[int, Example] = {}
    # In the source's own order, since a parquet file is read by row group.
    for position in sorted(range(len(records)), key=lambda i: records[i].key):
        record = records[position]
        if record.label not in numbers:
            raise DataError(f"{record.key}: label {record.label!r} is none of {', '.join(classes)}")
        image = to_tensor(source.image(record), side=side)
        group = getattr(record, "group", None)
        examples[position] = Example(image, numbers[record.label], group)
    return [examples[position] for position in range(len(records))]


def to_tensor(picture: Image.Image, *, side: int) -> Tensor:
    """An RGB picture as uint8 (3, height, width), shrunk if its shorter side is longer than `side` pixels."""
    # A copy, since torch takes no read-only memory.
    return torch.from_numpy(np.array(_shrink(picture, side))).permute(2, 0, 1).contiguous()


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    shorter = min(picture.size)
    if shorter <= side:
        return picture
    width, height = (max(side, round(length * side / shorter)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
