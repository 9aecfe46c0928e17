"""Checks of URLs within the dashboard."""

from __future__ import annotations

import re

__all__ = ["is_ambiguous", "local_path"]

_LOCAL = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?")
_MAX_LENGTH = 1024


def is_ambiguous(path: str) -> bool:
    """Return whether a path could be interpreted differently by a check and by a file system or browser."""
    lowered = path.lower()
    return (
        not path.startswith("/")
        or "//" in path
        or "\\" in path
        or not path.isprintable()
        or any(part in (".", "..") for part in path.split("/"))
        or any(code in lowered for code in ("%2e", "%2f", "%5c", "%00"))
    )


def local_path(text: str) -> str:
    """Return the text if it is a path and query within the dashboard, else `/`.

    It prevents open redirects: no result can be interpreted as another host.
    """
    path = text.partition("?")[0]
    if len(text) > _MAX_LENGTH or not _LOCAL.fullmatch(text) or is_ambiguous(path):
        return "/"
    # A redirect back to the login page would loop.
    return "/" if path in ("/login", "/logout") or path.startswith("/login/") else text
