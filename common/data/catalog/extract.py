"""Safe extraction of untrusted archives: no paths outside the folder, no links, bounded size."""

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
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from fedsigma.common.data.catalog.card import CardError
from fedsigma.common.utils.files import UnsafePath, safe_join

__all__ = ["ArchiveError", "ExtractionLimits", "TargetBlocked", "extract_archive"]

_CHUNK = 2**20
# Files that macOS adds to archives.
_LITTER = ("__MACOSX", ".DS_Store")

Member = tuple[PurePosixPath, Callable[[], IO[bytes]]]


class ArchiveError(CardError):
    """An archive is damaged or unsafe; nothing of it was extracted."""


class TargetBlocked(ArchiveError):
    """The archive cannot be written: a file exists already, or the disk is full."""


@dataclass(frozen=True, kw_only=True)
class ExtractionLimits:
    """Limits of an extraction, against archive bombs.

    Attributes:
        size: Total size in bytes.
        files: Number of files.
    """

    size: int
    files: int = 3_000_000

    @classmethod
    def of(cls, archive: Path) -> ExtractionLimits:
        """Return the limits for an archive of images: twenty times its size plus 64 MiB."""
        return cls(size=20 * archive.stat().st_size + 64 * _CHUNK)


def extract_archive(
    archive: Path, folder: Path, *, take: str = "", inner: str = "", limits: ExtractionLimits | None = None
) -> list[str]:
    """Extract a zip or tar archive into a folder, completely or not at all.

    Args:
        archive: The file.
        folder: Target folder; existing files are not replaced.
        take: Folder in the archive to extract; empty for all.
        inner: Archive in the extracted content, which is extracted in its place.
        limits: Limits of the extraction; None for `ExtractionLimits.of` the archive.

    Returns:
        The names of the new files and folders.

    Raises:
        ArchiveError: The file is not an archive or is damaged; a member is a link or device, leads out of the
            folder or occurs twice; a limit is exceeded; `take` is empty; or a file exists already.
    """
    work = folder / f".unpacking-{archive.name}"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
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
        # For a damaged archive, some libraries raise an OSError without an error number.
        kind = TargetBlocked if getattr(error, "errno", None) is not None else ArchiveError
        raise kind(f"{archive.name} cannot be unpacked: {error}") from error
    except UnsafePath as error:
        raise ArchiveError(f"{archive.name} is refused: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move(work: Path, folder: Path, name: str) -> list[str]:
    paths = sorted(work.iterdir())
    for path in paths:
        if (folder / path.name).exists():
            raise TargetBlocked(f"{folder / path.name} exists already, and {name} contains it: move it away")
    for path in paths:
        path.rename(folder / path.name)
    return [path.name for path in paths]


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
            # Mode x: a duplicate member may hide another content.
            with read() as source, target.open("xb") as sink:
                left = _copy(source, sink, left, archive.name)
    if not files:
        raise ArchiveError(f"{archive.name} holds no file" + (f" in {take}/" if take else ""))


def _copy(source: IO[bytes], sink: IO[bytes], left: int, name: str) -> int:
    """Copy and count the real size: sizes in the headers may be wrong."""
    while chunk := source.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise ArchiveError(f"{name} is refused: it unpacks to far more than its own size")
        sink.write(chunk)
    return left


def _members(archive: Path, opened: ExitStack) -> Iterator[Member]:
    """Yield the files of an archive with their checked paths."""
    if zipfile.is_zipfile(archive):
        return _of_zip(archive.name, opened.enter_context(zipfile.ZipFile(archive)))
    if tarfile.is_tarfile(archive):
        return _of_tar(archive.name, opened.enter_context(tarfile.open(archive)))
    raise ArchiveError(f"{archive.name} is not a zip or tar archive")


def _of_zip(name: str, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        path = safe_join(info.filename)
        if info.is_dir():
            continue
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ArchiveError(f"{name} is refused: {info.filename} is a link or no plain file")
        if info.flag_bits & 1:
            raise ArchiveError(f"{name} is refused: {info.filename} is encrypted")
        yield path, partial(archive.open, info)


def _of_tar(name: str, archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        if info.isdir() and info.name in (".", ""):
            continue
        path = safe_join(info.name)
        if info.isdir():
            continue
        source = archive.extractfile(info) if info.isreg() else None
        if source is None:
            raise ArchiveError(f"{name} is refused: {info.name} is a link or no plain file")
        yield path, lambda source=source: source  # type: ignore[misc]
