"""Decodes uploads: detects the format by content and enforces the size limits."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from PIL import Image
from torch import Tensor

from fedsigma.client.inference.predictor import preprocess
from fedsigma.client.serving.errors import Problem
from fedsigma.client.serving.limits import Limits
from fedsigma.common.backbones import Backbone
from fedsigma.common.data.records import to_rgb
from fedsigma.common.data.sources.dicom import DicomFile

__all__ = ["MEDIA_TYPES", "decode_image", "restrict_decoders"]

MEDIA_TYPES = ("image/png", "image/jpeg", "image/tiff", "application/dicom")
_SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def restrict_decoders(pixels: int) -> None:
    """Limit the image size of the decoding libraries in this process, and silence their warnings.

    The warnings can quote the content of a file, such as a name.

    Args:
        pixels: Most pixels of an image.
    """
    # Pillow rejects images of twice this number; pydicom uses Pillow for embedded images.
    Image.MAX_IMAGE_PIXELS = pixels // 2 or 1
    warnings.simplefilter("ignore")
    for name in ("pydicom", "PIL"):
        logging.getLogger(name).disabled = True


def decode_image(content: bytes, backbone: Backbone, limits: Limits, number: int) -> list[Tensor]:
    """Decode and preprocess the frames of an image.

    Args:
        content: Bytes of the file.
        backbone: Backbone that the frames are preprocessed for.
        limits: Limits of pixels and frames.
        number: Number of the image in the request, from 1.

    Returns:
        The frames, each uint8 of shape (3, image_size, image_size).

    Raises:
        Problem: The format is not supported, or the image is too large or damaged.
    """
    formats = [*_SIGNATURES, "DICOM"] if importlib.util.find_spec("pydicom") else [*_SIGNATURES]
    kind = "DICOM" if content[128:132] == b"DICM" else ""
    for name, signatures in _SIGNATURES.items():
        kind = name if not kind and content.startswith(signatures) else kind
    if kind not in formats:
        detail = f"Image {number} is none of {', '.join(sorted(formats))}."
        raise Problem("not-an-image", detail, image=number)
    frames = _slices(content, limits, number) if kind == "DICOM" else _picture(content, kind, limits, number)
    try:
        return [preprocess(backbone, to_rgb(frame)) for frame in frames]
    except Problem:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise _too_many_pixels(limits, number) from None
    except Exception:  # hostile bytes can cause any; its text can contain data of the file
        detail = f"Image {number} ({kind}) cannot be decoded."
        raise Problem("unreadable-image", detail, image=number) from None


def _picture(content: bytes, kind: str, limits: Limits, number: int) -> Iterator[Image.Image]:
    picture = Image.open(BytesIO(content), formats=[kind])
    # libtiff allocates a whole tile, however small the image is.
    tags: Any = getattr(picture, "tag_v2", {})
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    if max(picture.width * picture.height, tile) > limits.pixels:
        raise _too_many_pixels(limits, number)
    yield picture


def _slices(content: bytes, limits: Limits, number: int) -> Iterator[Image.Image]:
    if _deflated(content):
        detail = f"Image {number} is DICOM with a deflated transfer syntax: save it with another."
        raise Problem("unreadable-image", detail, image=number)
    slices = DicomFile.read(BytesIO(content), f"image {number}")
    if slices.frames > limits.images:
        detail = f"Image {number} has {slices.frames} frames, a request may have {limits.images}."
        raise Problem("too-many-images", detail, image=number)
    if int(slices.dataset.Rows) * int(slices.dataset.Columns) > limits.pixels:
        raise _too_many_pixels(limits, number)
    for frame in range(slices.frames):
        yield slices.image(frame)


def _deflated(content: bytes) -> bool:
    """Return whether pydicom would inflate the whole file, to any size; detected by its own reader."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    stream = BytesIO(content)
    stream.seek(132)
    head = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    return bool(head.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)


def _too_many_pixels(limits: Limits, number: int) -> Problem:
    detail = f"Image {number} has more than {limits.pixels} pixels: make a smaller copy."
    return Problem("too-many-pixels", detail, image=number)
