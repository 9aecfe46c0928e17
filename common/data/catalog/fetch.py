"""Fetches a published set: download, checksum, extraction, and a record of the fetched files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from fedsigma.common.config.fields import ListOf
from fedsigma.common.config.schema import build, settings
from fedsigma.common.data.catalog.card import Archive, CardError
from fedsigma.common.data.catalog.download import ProgressCallback, download
from fedsigma.common.data.catalog.extract import ArchiveError, TargetBlocked, extract_archive
from fedsigma.common.utils.files import write_atomic

__all__ = ["RECORD", "DigestError", "FetchedFile", "fetch_archive", "read_record"]

RECORD = "fetched.json"
"""Name of the record in the folder of a set."""
_DOWNLOADS = ".downloads"


class DigestError(CardError):
    """The checksum of a file differs; the file was removed."""


@settings
class FetchedFile:
    """Record of a fetched file.

    Attributes:
        url: Address of the file.
        size: Size in bytes.
        sha256: SHA-256, hexadecimal.
        checked_by: Publisher of the verified checksum; empty without one.
        content: Names of the extracted files and folders.
    """

    url: str
    size: int
    sha256: str
    checked_by: str
    content: ListOf[str]


def read_record(folder: Path) -> dict[str, FetchedFile]:
    """Read the record of a folder, by file name; empty without a record.

    Raises:
        CardError: The record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
        return {name: build(FetchedFile, values, where=str(file)) for name, values in content.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CardError(f"{file} is damaged ({error}): put it back from a copy, or remove it") from error


def fetch_archive(
    archive: Archive, folder: Path, *, progress: ProgressCallback = lambda done, total: None
) -> FetchedFile:
    """Download one file of a set, verify and extract it; existing files are not replaced.

    Without a published checksum, the SHA-256 of the first download is recorded, and later downloads into the
    folder must match it.

    Raises:
        CardError: The file cannot be downloaded, its checksum differs, or it cannot be extracted.
    """
    previous = read_record(folder).get(archive.name)
    if (
        previous
        and previous.url == archive.url
        and all((folder / name).exists() for name in previous.content)
    ):
        return previous
    file = folder / _DOWNLOADS / archive.name
    if not file.is_file():
        download(archive.url, file, size=archive.size, progress=progress)
    size, sha256 = file.stat().st_size, _verify(archive, file, previous)
    content = [archive.name]
    if archive.unpack:
        try:
            content = extract_archive(file, folder, take=archive.take, inner=archive.inner)
        except ArchiveError as error:
            if not isinstance(error, TargetBlocked):
                file.unlink()  # perhaps an error page of the server: download it again next time
            raise
        file.unlink()
    else:
        if (folder / archive.name).exists():
            raise CardError(f"{folder / archive.name} exists already: move it away")
        file.replace(folder / archive.name)
    if not any(file.parent.iterdir()):
        file.parent.rmdir()
    done = FetchedFile(
        url=archive.url, size=size, sha256=sha256, checked_by=archive.stated_by, content=tuple(content)
    )
    values = {name: asdict(record) for name, record in (read_record(folder) | {archive.name: done}).items()}
    write_atomic(folder / RECORD, (json.dumps(values, indent=2) + "\n").encode())
    return done


def _verify(archive: Archive, file: Path, previous: FetchedFile | None) -> str:
    """Return the SHA-256 of a file after comparing it with the published or recorded checksum."""
    sums = {}
    # MD5 is published to detect transmission errors; SHA-256 is recorded too.
    for kind in ("sha256", "md5"):
        with file.open("rb") as stream:
            sums[kind] = hashlib.file_digest(stream, kind).hexdigest()
    expected = [("sha256", archive.sha256, archive.stated_by), ("md5", archive.md5, archive.stated_by)]
    if not archive.stated_by and previous is not None and previous.url == archive.url:
        expected.append(
            ("sha256", previous.sha256, f"{RECORD} (of the first download; without it any will do)")
        )
    for kind, checksum, publisher in expected:
        if checksum and sums[kind] != checksum:
            file.unlink()
            raise DigestError(
                f"{archive.name} came with {kind} {sums[kind]}, and {publisher} states {checksum}:"
                " it was removed; fetch it again, and if that does not help, see the set's page"
            )
    return sums["sha256"]
