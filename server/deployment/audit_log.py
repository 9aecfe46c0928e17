"""The server's audit log: what was done with sites and studies, and what came of each run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.deployment.database import utc_now

__all__ = ["RunAuditor", "ServerAuditLog"]


class ServerAuditLog:
    """Appends to the audit log of a server.

    Args:
        path: of the server's folder.
    """

    def __init__(self, path: Path) -> None:
        self._chain = HashChainedLog(path / "audit.jsonl")

    def record(self, kind: str, **fields: object) -> None:
        """Write a line, with the time.

        Raises:
            OSError, ChainBroken: it cannot be written, or an earlier line was changed or removed.
        """
        self._chain.append({"time": utc_now().isoformat(), "kind": kind, **fields})


AUDITED_EVENTS = frozenset(
    {
        "run_start",
        "site_ready",
        "site_refused",
        "reply_accepted",
        "reply_rejected",
        "evaluation_accepted",
        "site_timed_out",
        "site_failed",
        "site_budget_exhausted",
        "masked_sum_rejected",
        "checkpoint_damaged",
        "run_interrupted",
        "run_end",
    }
)
_FIELDS = ("round", "site", "reason", "bytes", "sha256", "ok", "file", "resume")


class RunAuditor:
    """Writes the events of one run into the server's audit log.

    Args:
        path: of the server's folder.
        study, run: its name, and the run's number.
    """

    def __init__(self, path: Path, *, study: str, run: str) -> None:
        self._log = ServerAuditLog(path)
        self._about = {"study": study, "run": run}

    @classmethod
    def from_environment(cls, *, study: str, run: str) -> RunAuditor | None:
        """That of the server whose `fedsigma server up` started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_SERVER", "")
        return cls(Path(folder), study=study, run=run) if folder else None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write down an event of the run folder, if it is one that counts.

        Raises:
            OSError, ChainBroken: it cannot be written; the run must not go on without it.
        """
        if event["kind"] in AUDITED_EVENTS:
            told = {name: event[name] for name in _FIELDS if name in event}
            self._log.record(event["kind"], **self._about, **told)
