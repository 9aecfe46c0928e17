"""Resumable HTTP download of a file; a file that changed on the server is downloaded from the start."""

from __future__ import annotations

import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from fedsigma.common import __version__
from fedsigma.common.data.catalog.card import CardError
from fedsigma.common.utils.files import write_atomic

__all__ = ["DownloadError", "ProgressCallback", "download"]

ProgressCallback = Callable[[int, int], None]
"""Called with the downloaded bytes and the total bytes, 0 if unknown."""

_CHUNK = 2**18
_TIMEOUT_S = 60
_SPARE = 2**30  # bytes left free on the disk


class DownloadError(CardError):
    """A download failed; what was received is kept for the next attempt."""


def download(
    url: str, target: Path, *, size: int = 0, progress: ProgressCallback = lambda done, total: None
) -> None:
    """Download a file by HTTP, resuming an interrupted download.

    A download is resumed only if the file on the server is unchanged, by its ETag or date.

    Args:
        url: Address, http or https.
        target: Path of the file; `target`.part until it is complete.
        size: Expected size in bytes; 0 if unknown.
        progress: Callback for the progress.

    Raises:
        DownloadError: The server cannot be reached or refuses, the connection breaks, the size differs, or
            the disk is full.
    """
    part, mark = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.version")
    target.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    version = mark.read_text("utf-8") if have and mark.is_file() else ""
    headers = {"User-Agent": f"fedsigma/{__version__}", "Accept-Encoding": "identity"}
    if version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S
        ) as reply:
            _receive(reply, part, mark, have, size, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.unlink(missing_ok=True)
        raise DownloadError(
            f"{url}: the server returned {error.code} {error.reason}: try again, or see the set's page"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url} was not reached, or the connection broke ({reason}): run it again to resume"
        ) from error
    part.replace(target)
    mark.unlink(missing_ok=True)


def _receive(
    reply: http.client.HTTPResponse, part: Path, mark: Path, have: int, size: int, progress: ProgressCallback
) -> None:
    url = reply.geturl()
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: expected http or https")
    if reply.status != 206 or not str(reply.headers.get("Content-Range", "")).startswith(f"bytes {have}-"):
        have = 0
    if reply.status == 206 and not have:
        raise DownloadError(
            f"{url}: the server sent another range than requested: remove {part} and try again"
        )
    length = reply.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() else size
    if size and total != size:
        raise DownloadError(
            f"{url} has {total:,} bytes, expected {size:,}: the file was changed, see the set's page"
        )
    free = shutil.disk_usage(part.parent).free
    if total - have > free - _SPARE:
        raise DownloadError(
            f"{url} has {total:,} bytes, and {part.parent} has room for {max(free - _SPARE, 0):,}"
        )
    if not have:
        part.unlink(missing_ok=True)
        write_atomic(mark, _version(reply).encode())
    with part.open("ab") as sink:
        while chunk := reply.read(_CHUNK):
            have += len(chunk)
            if total and have > total:
                raise DownloadError(f"{url} sent more than the announced {total:,} bytes")
            sink.write(chunk)
            progress(have, total)
    if total and have != total:
        raise DownloadError(
            f"{url}: the connection broke after {have:,} of {total:,} bytes: run it again to resume"
        )


def _version(reply: http.client.HTTPResponse) -> str:
    """Return the validator of a file for If-Range (RFC 9110, 13.1.5); empty without a usable one."""
    tag = str(reply.headers.get("ETag", ""))
    return tag if tag.startswith('"') else str(reply.headers.get("Last-Modified", ""))
