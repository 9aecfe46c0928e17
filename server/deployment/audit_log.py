"""The server's audit log: changes to sites and studies, and the outcome of each run."""

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
        path: The server's folder.
    """

    def __init__(self, path: Path) -> None:
        self._log = HashChainedLog(path / "audit.jsonl")

    def record(self, kind: str, **fields: object) -> None:
        """Append a line with the present time.

        Args:
            kind: Kind of the event.
            **fields: Its values.

        Raises:
            OSError: The line cannot be written.
            LogTampered: An earlier line was changed or removed.
        """
        self._log.append({"time": utc_now().isoformat(), "kind": kind, **fields})


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
"""The kinds of run events that the audit log records."""
_FIELDS = ("round", "site", "reason", "bytes", "sha256", "ok", "file", "resume")


class RunAuditor:
    """Writes the events of one run into the server's audit log.

    Args:
        path: The server's folder.
        study: The study's name.
        run: The run's number.
    """

    def __init__(self, path: Path, *, study: str, run: str) -> None:
        self._log = ServerAuditLog(path)
        self._run = {"study": study, "run": run}

    @classmethod
    def from_environment(cls, *, study: str, run: str) -> RunAuditor | None:
        """Return the auditor of the server that started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_SERVER", "")
        return cls(Path(folder), study=study, run=run) if folder else None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Append an event of the run folder, if its kind is in `AUDITED_EVENTS`.

        Raises:
            OSError: The line cannot be written; the run must not continue without it.
            LogTampered: An earlier line was changed or removed.
        """
        if event["kind"] in AUDITED_EVENTS:
            fields = {name: event[name] for name in _FIELDS if name in event}
            self._log.record(event["kind"], **self._run, **fields)
