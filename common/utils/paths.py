"""Relative paths from files that others wrote: none may lead out of the folder that it starts from."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

__all__ = ["UnsafePath", "inside"]


class UnsafePath(ValueError):
    """A relative path may lead out of the folder that it starts from."""


def inside(text: str) -> PurePosixPath:
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
