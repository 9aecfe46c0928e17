"""The site's audit log: one JSON line for each reply, written before the reply is sent.

The log never leaves the site. Its lines are chained (`fedsigma.common.utils.hash_chain`), so that a changed
or removed line can be detected.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.common.wire.digest import describe

__all__ = ["log_reply"]


def log_reply(path: Path, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
    """Append a request and its reply to the audit log, and flush them to the disk.

    Args:
        path: File of the log; created with the first line.
        request: Kind of message, study, round and run.
        reply: The fields of the reply as they are sent, or `{"error": type name}`.

    Raises:
        OSError: The line cannot be written; the reply must not be sent.
        LogTampered: An earlier line was removed; the reply must not be sent.
    """
    entry = {"time": round(time.time(), 3), "request": dict(request), "reply": describe(reply)}
    HashChainedLog(path).append(entry)
