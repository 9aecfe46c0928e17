"""Unpacking an archive that strangers made: into its folder only, no links, and no more than expected."""

from __future__ import annotations

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from fedsigma.common.data.catalog.card import CardError
from fedsigma.common.utils.files import UnsafePath, safe_join

__all__ = ["ArchiveError", "ExtractionLimits", "TargetBlocked", "extract_archive"]

_CHUNK = 2**20
# Written by the archiver of macOS beside each file.
_LITTER = ("__MACOSX", ".DS_Store")

Member = tuple[PurePosixPath, Callable[[], IO[bytes]]]


class ArchiveError(CardError):
    """An archive cannot be unpacked, or is refused; nothing of it was left."""


class TargetBlocked(ArchiveError):
    """The archive may be right and has no place: something is in the way, or the disk is full."""


@dataclass(frozen=True, kw_only=True)
class ExtractionLimits:
    """The most that may come out of an archive, against one that swells: bytes in all, and files."""

    size: int
    files: int = 3_000_000

    @classmethod
    def of(cls, archive: Path) -> ExtractionLimits:
        """What images can come to, which hardly shrink in an archive: twenty times its size, and 64 MiB."""
        return cls(size=20 * archive.stat().st_size + 64 * _CHUNK)


def extract_archive(
    archive: Path, folder: Path, *, take: str = "", inner: str = "", limits: ExtractionLimits | None = None
) -> list[str]:
    """Unpack a zip or tar archive into a folder, all of it or nothing.

    Args:
        archive: the file.
        folder: where its content goes; what is there already is not replaced.
        take: the folder in the archive whose content is wanted, in place of all.
        inner: an archive in that content, which is unpacked where it lies and taken away.
        limits: the most that may come out; without them, `Limits.of` the archive.

    Returns:
        The names of what is new in the folder.

    Raises:
        ArchiveError: it is no archive or damaged; a member is a link or device, leads out of the folder or
            comes twice; it holds more than the limits; nothing is at `take`; or something is in the way.
    """
    work = folder / f".unpacking-{archive.name}"
    shutil.rmtree(work, ignore_errors=True)  # of an attempt that was killed
    work.mkdir(parents=True)
    try:
        _extract(archive, work, take, limits or ExtractionLimits.of(archive))
        if inner:
            nested = work / safe_join(inner)
            if not nested.is_file():
                raise ArchiveError(f"{archive.name} has no {inner} in it")
            _extract(nested, nested.parent, "", limits or ExtractionLimits.of(nested))
            nested.unlink()
        return _move(work, folder, archive.name)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        NotImplementedError,
    ) as error:
        # A damaged archive is an OSError, too, for some of the libraries, and then has no error number.
        kind = TargetBlocked if getattr(error, "errno", None) is not None else ArchiveError
        raise kind(f"{archive.name} cannot be unpacked: {error}") from error
    except UnsafePath as error:
        raise ArchiveError(f"{archive.name} is refused: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move(work: Path, folder: Path, name: str) -> list[str]:
    found = sorted(work.iterdir())
    for one in found:
        if (folder / one.name).exists():
            raise TargetBlocked(
                f"{folder / one.name} is there already, and {name} would write it: move it away"
            )
    for one in found:
        one.rename(folder / one.name)
    return [one.name for one in found]


def _extract(archive: Path, folder: Path, take: str, limits: ExtractionLimits) -> None:
    top = PurePosixPath(take)
    left, files = limits.size, 0
    with ExitStack() as opened:
        for path, read in _members(archive, opened):
            if path.name.startswith("._") or set(path.parts) & set(_LITTER):
                continue
            if not path.is_relative_to(top) or path == top:
                continue
            files += 1
            if files > limits.files:
                raise ArchiveError(f"{archive.name} is refused: it has more than {limits.files:,} files")
            target = folder / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Mode x: a file that comes twice may be an attack on those who look at the first only.
            with read() as source, target.open("xb") as sink:
                left = _copy(source, sink, left, archive.name)
    if not files:
        raise ArchiveError(f"{archive.name} holds no file" + (f" in {take}/" if take else ""))


def _copy(source: IO[bytes], sink: IO[bytes], left: int, name: str) -> int:
    """Copy, counting what really comes out: the sizes in an archive's headers may be wrong."""
    while chunk := source.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise ArchiveError(f"{name} is refused: it unpacks to far more than its own size")
        sink.write(chunk)
    return left


def _members(archive: Path, opened: ExitStack) -> Iterator[Member]:
    """The files of an archive, each with its checked path; folders are made as files need them."""
    if zipfile.is_zipfile(archive):
        return _of_zip(archive.name, opened.enter_context(zipfile.ZipFile(archive)))
    if tarfile.is_tarfile(archive):
        return _of_tar(archive.name, opened.enter_context(tarfile.open(archive)))
    raise ArchiveError(f"{archive.name} is no zip or tar archive")


def _of_zip(name: str, archive: zipfile.ZipFile) -> Iterator[Member]:
    for one in archive.infolist():
        path = safe_join(one.filename)
        if one.is_dir():
            continue
        mode = stat.S_IFMT(one.external_attr >> 16)
        if mode not in (0, stat.S_IFREG):
            raise ArchiveError(f"{name} is refused: {one.filename} is a link or no plain file")
        if one.flag_bits & 1:
            raise ArchiveError(f"{name} is refused: {one.filename} is encrypted")
        yield path, lambda one=one: archive.open(one)  # type: ignore[misc]


def _of_tar(name: str, archive: tarfile.TarFile) -> Iterator[Member]:
    for one in archive:
        if one.isdir():
            if one.name not in (".", ""):
                safe_join(one.name)
            continue
        path = safe_join(one.name)
        source = archive.extractfile(one) if one.isreg() else None
        if source is None:
            raise ArchiveError(f"{name} is refused: {one.name} is a link or no plain file")
        yield path, lambda source=source: source  # type: ignore[misc]
