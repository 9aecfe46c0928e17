"""The centre's audit log: what was done with sites and studies, and what came of each run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsigma.common.utils.hash_chain import Chain
from fedsigma.server.deployment.database import now

__all__ = ["CentreLog", "Witness"]


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


KINDS = frozenset(
    {
        "run_start",
        "site_ready",
        "site_refused",
        "reply_accepted",
        "reply_rejected",
        "evaluation_accepted",
        "site_late",
        "site_failed",
        "site_spent",
        "masked_sum_rejected",
        "checkpoint_damaged",
        "run_interrupted",
        "run_end",
    }
)
_FIELDS = ("round", "site", "reason", "bytes", "sha256", "ok", "file", "resume")


class Witness:
    """Writes the events of one run into the centre's audit log.

    Args:
        path: of the centre's folder.
        study, run: its name, and the run's number.
    """

    def __init__(self, path: Path, *, study: str, run: str) -> None:
        self._log = CentreLog(path)
        self._about = {"study": study, "run": run}

    @classmethod
    def of_this_process(cls, *, study: str, run: str) -> Witness | None:
        """That of the centre whose `fedsigma server up` started this process; None in a simulation."""
        folder = os.environ.get("FEDSIGMA_CENTRE", "")
        return cls(Path(folder), study=study, run=run) if folder else None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write down an event of the run folder, if it is one that counts.

        Raises:
            OSError, ChainBroken: it cannot be written; the run must not go on without it.
        """
        if event["kind"] in KINDS:
            told = {name: event[name] for name in _FIELDS if name in event}
            self._log.note(event["kind"], **self._about, **told)
