"""Getting a published set on request: download, checksum, unpacking, and a record of what came."""

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
"""Written into the folder of a set: what was fetched, and by what it was checked."""
_DOWNLOADS = ".downloads"


class DigestError(CardError):
    """A file is not the one that was expected; it was removed."""


@settings
class FetchedFile:
    """One file as it came.

    checked_by: who states the checksum that it agrees with, '' for nobody. content: the names of what it left
    in the folder.
    """

    url: str
    size: int
    sha256: str
    checked_by: str
    content: ListOf[str]


def read_record(folder: Path) -> dict[str, FetchedFile]:
    """Read the record of a folder, by the names of the files; empty if nothing was fetched into it.

    Raises:
        CardError: the record is damaged.
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
    archive: Archive, folder: Path, *, progress: ProgressCallback = lambda done, whole: None
) -> FetchedFile:
    """Download one file of a set, check and unpack it; what is in the folder already is left as it is.

    Where nobody states a checksum, the SHA-256 of what first came and could be unpacked is kept in the
    record, and a later download into the folder must agree with it.

    Raises:
        CardError: the file cannot be had, is not the expected one, or cannot be unpacked.
    """
    known = read_record(folder).get(archive.name)
    if known and known.url == archive.url and all((folder / name).exists() for name in known.content):
        return known
    file = folder / _DOWNLOADS / archive.name
    if not file.is_file():
        download(archive.url, file, size=archive.size, progress=progress)
    size, sha256 = file.stat().st_size, _verified(archive, file, known)
    content = [archive.name]
    if archive.unpack:
        try:
            content = extract_archive(file, folder, take=archive.take, inner=archive.inner)
        except ArchiveError as error:
            if not isinstance(error, TargetBlocked):
                file.unlink()  # a page that a server sent in its place, for one: the next attempt asks anew
            raise
        file.unlink()
    else:
        if (folder / archive.name).exists():
            raise CardError(f"{folder / archive.name} is there already: move it away")
        file.replace(folder / archive.name)
    if not any(file.parent.iterdir()):
        file.parent.rmdir()
    done = FetchedFile(
        url=archive.url, size=size, sha256=sha256, checked_by=archive.stated_by, content=tuple(content)
    )
    _record(folder, archive.name, done)
    return done


def _verified(archive: Archive, file: Path, known: FetchedFile | None) -> str:
    """The SHA-256 of the file as it came.

    Raises:
        DigestError: it is not the one that is stated, or, where nothing is, not the one that came before.
    """
    sums = _sums(file)
    expected = [("sha256", archive.sha256, archive.stated_by), ("md5", archive.md5, archive.stated_by)]
    if not archive.stated_by and known is not None and known.url == archive.url:
        expected.append(("sha256", known.sha256, f"{RECORD} (of the first download; without it any will do)"))
    for kind, wanted, who in expected:
        if wanted and sums[kind] != wanted:
            file.unlink()
            raise DigestError(
                f"{archive.name} came with {kind} {sums[kind]}, and {who} states {wanted}: it was removed;"
                " fetch it again, and if that does not help, see the set's page"
            )
    return sums["sha256"]


def _sums(file: Path) -> dict[str, str]:
    # MD5 tells transmission errors, which is what its publishers state it for; SHA-256 is kept beside it.
    sums = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            for one in sums.values():
                one.update(chunk)
    return {kind: one.hexdigest() for kind, one in sums.items()}


def _record(folder: Path, name: str, came: FetchedFile) -> None:
    values = {key: asdict(one) for key, one in (read_record(folder) | {name: came}).items()}
    write_atomic(folder / RECORD, (json.dumps(values, indent=2) + "\n").encode())
