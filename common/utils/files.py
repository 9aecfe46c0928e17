"""Atomic writing of small files, safe relative paths, and the folder of runs."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path, PurePosixPath

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["UnsafePath", "runs_folder", "safe_join", "write_atomic", "write_secret", "write_whole"]


def runs_folder() -> Path:
    """Return the default folder of runs: $FEDSIGMA_RUNS, or ~/fedsigma-runs."""
    return Path(os.environ.get("FEDSIGMA_RUNS") or Path.home() / "fedsigma-runs").expanduser().resolve()


def write_secret(path: Path, content: bytes) -> None:
    """Replace a file atomically; only its owner can read it."""
    _write(path, content, 0o600)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically; only its owner can write it."""
    _write(path, content, 0o644)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file atomically, with the permissions of an ordinary new file; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content, 0o666)


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class UnsafePath(FedSigmaError, ValueError):
    """A relative path may leave its folder."""


def safe_join(text: str) -> PurePosixPath:
    """Parse a relative path that stays below its folder on any system; links are not resolved.

    Raises:
        UnsafePath: The path is empty or absolute, or has a part '..', a backslash, a drive or a control
            character.
    """
    path = PurePosixPath(text)
    unsafe = (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in text
        or not text.isprintable()
        or re.match(r"[A-Za-z]:", text) is not None
    )
    if unsafe:
        raise UnsafePath(f"the path {text!r} is refused: expected a relative path that stays in its folder")
    return path
