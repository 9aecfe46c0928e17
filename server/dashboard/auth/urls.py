"""Addresses within the dashboard."""

from __future__ import annotations

import re

__all__ = ["local_path", "strange"]

_LOCAL = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?")
_LONGEST = 1024


def strange(path: str) -> bool:
    """Whether a path could mean one thing to a check and another to who looks for a file or a host by it."""
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
    """The path and query, if that is what the text is and no host can be read into it; else `/`."""
    path = text.partition("?")[0]
    if len(text) > _LONGEST or not _LOCAL.fullmatch(text) or strange(path):
        return "/"
    # Back at the door, one would be sent on and on.
    return "/" if path in ("/login", "/logout") or path.startswith("/login/") else text
