"""The server's audit log: changes to sites and studies, and the outcome of each run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.deployment.database import utc_now

__all__ = ["AUDITED_EVENTS", "ServerAuditLog", "run_auditor"]


class ServerAuditLog:
    """Appends to the audit log of a server.

    Args:
        path: The server's folder.
    """

    def __init__(self, path: Path) -> None:
        self._log = HashChainedLog(path / "audit.jsonl")

    def record(self, kind: str, **fields: object) -> None:
        """Append an event with the present time.

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


def run_auditor(*, study: str, run: str) -> Callable[[Mapping[str, Any]], None] | None:
    """Return a listener that writes a run's events into its server's audit log.

    It skips events of other kinds than `AUDITED_EVENTS`. It raises an error if it cannot write, since a run
    must not continue without its audit log.

    Args:
        study: Name of the study.
        run: Number of the run.

    Returns:
        The listener; None in a simulation, which has no server.
    """
    folder = os.environ.get("FEDSIGMA_SERVER", "")
    if not folder:
        return None
    log = ServerAuditLog(Path(folder))

    def record(event: Mapping[str, Any]) -> None:
        if event["kind"] in AUDITED_EVENTS:
            fields = {name: event[name] for name in _FIELDS if name in event}
            log.record(event["kind"], study=study, run=run, **fields)

    return record
