"""The images of a request, out of its body: in memory only, counted while they arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from fedsigma.client.serving.errors import Problem
from fedsigma.client.serving.limits import Limits

__all__ = ["FIELD", "read_images"]

FIELD = "images"


class _Form:
    """The parts of a form as they arrive; the names that files are given are dropped unread.

    Not Starlette's parser: it writes files of more than a megabyte to the disk.
    """

    def __init__(self, boundary: bytes, most: int) -> None:
        self.parts: list[bytearray] = []
        self.complete = False
        self._most, self._field, self._value, self._disposition = most, b"", b"", b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_field,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._check_name,
                "on_part_data": self._add_data,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._parser.write(chunk)

    def _begin(self) -> None:
        if len(self.parts) >= self._most:
            raise Problem("too-many-images", f"A request has at most {self._most} images.")
        self.parts.append(bytearray())
        self._disposition = b""

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _check_name(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != FIELD.encode():
            raise Problem("malformed", f"Expected files named {FIELD}, and nothing else.")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1] += data[start:end]

    def _end(self) -> None:
        self.complete = True


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """The contents of the files named `images` of a form.

    Raises:
        Problem: it is no form, malformed, or larger than the limits.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise Problem("not-a-form", f"Send multipart/form-data with files named {FIELD}.")
    boundary = options.get(b"boundary")
    if not boundary:
        raise Problem("malformed", "The header Content-Type names no boundary.")
    try:
        form = _Form(boundary, limits.images)
        async for chunk in _stream_body(request, limits.body_bytes):
            form.write(chunk)
    except FormParserError:
        raise Problem("malformed", "The form cannot be read: see RFC 7578.") from None
    if not form.complete or not form.parts:
        raise Problem("malformed", f"The form ends early, or has no file named {FIELD}.")
    return [bytes(part) for part in form.parts]


async def _stream_body(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body, until it is too long; what Content-Length says is believed only where it says too much."""
    told = request.headers.get("content-length", "")
    large = told.isdecimal() and len(told) < 20 and int(told) > most
    total = 0
    if not large:
        async for chunk in request.stream():
            total += len(chunk)
            large = total > most
            if large:
                break
            yield chunk
    if large:
        raise Problem("body-too-large", f"A body has at most {most} bytes.")
