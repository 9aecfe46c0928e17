"""One file from the web: what came before an interruption is kept, and a file that changed is begun anew."""

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
"""Called with the bytes that are here and those of the whole, 0 if that is not known."""

_CHUNK = 2**18
_TIMEOUT_S = 60
_SPARE = 2**30  # bytes of the disk that stay free


class DownloadError(CardError):
    """A file cannot be had; what came of it is kept for the next attempt."""


def download(
    url: str, target: Path, *, size: int = 0, progress: ProgressCallback = lambda done, whole: None
) -> None:
    """Get a file by HTTP into `target`, going on where an earlier call was interrupted.

    Parts of two different files are never joined: a part is gone on with only if the server says, by ETag or
    date, that the file is still the same.

    Args:
        url: http or https.
        target: the file; until it is whole it is called `target`.part.
        size: of the whole in bytes, 0 if not known; a file of another size is refused.
        progress: see `ProgressCallback`.

    Raises:
        DownloadError: the server is not reached or refuses, the connection ends early, the size is another,
            or the disk is too small.
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
        if error.code == 416:  # the part is longer than the file is now
            part.unlink(missing_ok=True)
        raise DownloadError(
            f"{url}: the server answers {error.code} {error.reason}: try again, or see the set's page"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"{url} was not reached, or broke off ({reason}): run it again, it goes on from there"
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
            f"{url}: the server sends another part than was asked for: remove {part} and try again"
        )
    length = reply.headers.get("Content-Length", "")
    whole = have + int(length) if length.isdecimal() else size
    if size and whole != size:
        raise DownloadError(
            f"{url} has {whole:,} bytes, expected {size:,}: the file was changed, see the set's page"
        )
    free = shutil.disk_usage(part.parent).free
    if whole - have > free - _SPARE:
        raise DownloadError(
            f"{url} has {whole:,} bytes, and {part.parent} has room for {max(free - _SPARE, 0):,}"
        )
    if not have:
        part.unlink(missing_ok=True)
        write_atomic(mark, _version(reply).encode())
    with part.open("ab") as sink:
        while chunk := reply.read(_CHUNK):
            have += len(chunk)
            if whole and have > whole:
                raise DownloadError(f"{url} sends more than the {whole:,} bytes that were announced")
            sink.write(chunk)
            progress(have, whole)
    if whole and have != whole:
        raise DownloadError(
            f"{url} broke off after {have:,} of {whole:,} bytes: run it again, it goes on from there"
        )


def _version(reply: http.client.HTTPResponse) -> str:
    """What the server calls this version of the file; '' if that cannot be asked for (RFC 9110, 13.1.5)."""
    tag = str(reply.headers.get("ETag", ""))
    return tag if tag.startswith('"') else str(reply.headers.get("Last-Modified", ""))
