"""Checks of URLs: those in settings, and those within the dashboard."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

__all__ = ["HERE", "check_url", "is_ambiguous", "local_path"]

HERE = ("127.0.0.1", "localhost", "::1")
"""Host names of this machine itself."""

_LOCAL = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*(\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?")
_MAX_LENGTH = 1024


def check_url(url: str) -> None:
    """Refuse a URL without TLS, unless its host is this machine.

    Raises:
        ValueError: It is neither https://HOST nor http:// with a host of this machine.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in HERE)
        valid = valid and bool(parts.hostname) and not parts.username and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("expected https://..., or http://127.0.0.1:PORT on this machine")


def is_ambiguous(path: str) -> bool:
    """Return whether a path could be interpreted differently by a check and by a file system or browser."""
    return (
        not path.startswith("/")
        or "//" in path
        or "\\" in path
        or not path.isprintable()
        or any(part in (".", "..") for part in path.split("/"))
        or any(code in path.lower() for code in ("%2e", "%2f", "%5c", "%00"))
    )


def local_path(text: str) -> str:
    """Return the text if it is a path and query within the dashboard, else `/`, to prevent open redirects."""
    path = text.partition("?")[0]
    if len(text) > _MAX_LENGTH or not _LOCAL.fullmatch(text) or is_ambiguous(path):
        return "/"
    # A redirect back to the login page would loop.
    return "/" if path in ("/login", "/logout") or path.startswith("/login/") else text
