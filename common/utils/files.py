"""Writing small files that must be whole, and secret ones that their owner alone may read; where runs go."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path, PurePosixPath

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["UnsafePath", "runs_folder", "safe_join", "write_atomic", "write_secret", "write_whole"]


def runs_folder() -> Path:
    """Where run folders go unless a run says otherwise: $FEDSIGMA_RUNS, or ~/fedsigma-runs."""
    return Path(os.environ.get("FEDSIGMA_RUNS") or Path.home() / "fedsigma-runs").expanduser().resolve()


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read, in one step and instead of one that is there."""
    _write(path, content, 0o600)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can write, so that no reader and no crash finds half of it."""
    _write(path, content, 0o644)


def write_atomic(path: Path, content: bytes) -> None:
    """As `write_whole`, with what an ordinary new file has, making its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content, 0o666)


def _write(path: Path, content: bytes, mode: int) -> None:
    # Not tempfile, whose files are private.
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
    """A relative path may lead out of the folder that it starts from."""


def safe_join(text: str) -> PurePosixPath:
    """Read a relative path that stays below the folder it starts from, whatever the system.

    Links are not looked at: what lies in the folder is its owner's choice.

    Raises:
        UnsafePath: it is empty, absolute, has a part '..', a backslash, a drive or a control character.
    """
    path = PurePosixPath(text)
    refused = (
        not path.parts
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in text
        or not text.isprintable()
        or re.match(r"[A-Za-z]:", text) is not None
    )
    if refused:
        raise UnsafePath(f"the path {text!r} is refused: expected a relative path that stays in its folder")
    return path
