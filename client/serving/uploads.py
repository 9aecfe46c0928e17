"""The images of a request, out of its body: in memory only, counted while they arrive."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from fedsigma.client.serving.problems import Problem
from fedsigma.client.serving.settings import Limits

__all__ = ["FIELD", "received"]

FIELD = "images"


class _InMemory(MultiPartParser):
    """Starlette's parser, which writes no image to a disk and stops at a number of parts."""

    spool_max_size = 0  # the standard library's word for: never

    most: int
    parts = 0

    def on_part_begin(self) -> None:
        """Count a part as it begins."""
        self.parts += 1
        if self.parts > self.most:
            raise Problem("too-many-images", f"A request has at most {self.most} images.")
        super().on_part_begin()


async def received(request: Request, limits: Limits) -> list[bytes]:
    """The contents of the files named `images` of a form; their own names are not looked at.

    Raises:
        Problem: it is no form, malformed, or larger than the limits.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem("not-a-form", f"Send multipart/form-data with files named {FIELD}.")
    parser = _InMemory(request.headers, _counted(request, limits.body_bytes))
    parser.most = limits.images
    try:
        items = (await parser.parse()).multi_items()
    except (MultiPartException, FormParserError, UnicodeError, LookupError):
        raise Problem("malformed", "The form cannot be read: see RFC 7578.") from None
    files = [value for name, value in items if name == FIELD and isinstance(value, UploadFile)]
    if not files or len(files) != len(items):
        raise Problem("malformed", f"Expected one or several files named {FIELD}, and nothing else.")
    return [file.file.read() for file in files]


async def _counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body, until it is too long; what Content-Length says is believed only where it says too much."""
    told = request.headers.get("content-length", "")
    total = int(told) if told.isdecimal() and len(told) < 20 else 0
    if total <= most:
        total = 0
        async for chunk in request.stream():
            total += len(chunk)
            if total > most:
                break
            yield chunk
    if total > most:
        raise Problem("body-too-large", f"A body has at most {most} bytes.")
