"""Reads the images of a request from its body, in memory only and with a running size check."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from fedsigma.client.serving.errors import Problem
from fedsigma.client.serving.limits import Limits

__all__ = ["FIELD", "read_images"]

FIELD = "images"


class _Form:
    """Parses a form as it arrives, in memory; Starlette's parser writes large files to the disk."""

    def __init__(self, boundary: bytes, max_images: int) -> None:
        self.parts: list[bytearray] = []
        self.complete = False
        self._max_images, self._field, self._value, self._disposition = max_images, b"", b"", b""
        callbacks: Any = {name[1:]: getattr(self, name) for name in dir(self) if name.startswith("_on_")}
        self.write = MultipartParser(boundary, callbacks).write

    def _on_part_begin(self) -> None:
        if len(self.parts) >= self._max_images:
            raise Problem("too-many-images", f"A request has at most {self._max_images} images.")
        self.parts.append(bytearray())
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD.encode():
            raise Problem("malformed", f"Expected files named {FIELD}, and nothing else.")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1] += data[start:end]

    def _on_end(self) -> None:
        self.complete = True


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """Return the contents of the files named `images` of a form.

    Raises:
        Problem: The body is not a form, is malformed, or exceeds a limit.
    """
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data":
        raise Problem("not-a-form", f"Send multipart/form-data with files named {FIELD}.")
    boundary = options.get(b"boundary")
    if not boundary:
        raise Problem("malformed", "The header Content-Type names no boundary.")
    try:
        form = _Form(boundary, limits.images)
        async for chunk in _stream_body(request, limits.body_bytes):
            form.write(chunk)
    except FormParserError:
        raise Problem("malformed", "The form is invalid: see RFC 7578.") from None
    if not form.complete or not form.parts:
        raise Problem("malformed", f"The form ends early, or has no file named {FIELD}.")
    return [bytes(part) for part in form.parts]


async def _stream_body(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body while it is within the limit; Content-Length is only used to reject early."""
    length = request.headers.get("content-length", "")
    total = int(length) if length.isdecimal() and len(length) < 20 else 0
    problem = Problem("body-too-large", f"A body has at most {max_bytes} bytes.")
    if total > max_bytes:
        raise problem
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:
            raise problem
        yield chunk
