"""The site's record of every answer it gave: one JSON line for each, written before the answer leaves.

The log belongs to the site and never leaves it. Its lines are chained
(`fedsigma.common.utils.hash_chain`), so that a line that was changed or removed later is found.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.common.wire.digest import describe

__all__ = ["AuditLog"]


class AuditLog:
    """Appends to one site's log."""

    def __init__(self, path: Path) -> None:
        self._log = HashChainedLog(path)

    def record(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        """Write down what was asked and what is about to leave, and make sure that it is on the disk.

        Args:
            asked: what the server wanted: kind of message, study, round.
            left: the fields of the reply as they lie on the wire, or `{"error": type name}`.

        Raises:
            OSError, ChainBroken: the line cannot be written, or an earlier one was removed; the reply must
                then not be sent.
        """
        self._log.append({"time": round(time.time(), 3), "asked": dict(request), "left": describe(reply)})
