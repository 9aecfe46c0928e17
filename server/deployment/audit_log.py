"""The centre's audit log: what was done with sites and studies, and what came of each run."""

from __future__ import annotations

from pathlib import Path

from fedsigma.common.utils.hash_chain import Chain
from fedsigma.server.deployment.registry import now

__all__ = ["CentreLog"]


class CentreLog:
    """Appends to the audit log of a centre.

    Args:
        path: of the centre's folder.
    """

    def __init__(self, path: Path) -> None:
        self._chain = Chain(path / "audit.jsonl")

    def note(self, kind: str, **fields: object) -> None:
        """Write a line, with the time.

        Raises:
            OSError, ChainBroken: it cannot be written, or an earlier line was changed or removed.
        """
        self._chain.append({"time": now().isoformat(), "kind": kind, **fields})
