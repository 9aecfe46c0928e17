"""The state of sites and runs as Flower's SuperLink reports it, polled in the background."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Sequence
from typing import Any

from fedsigma.server.deployment.database import ServerDatabase
from fedsigma.server.deployment.flower_control import ControlError, FlowerControl, Node
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.report.formatting import MISSING, format_timestamp
from fedsigma.server.runs.summary import last_contacts

__all__ = ["SuperLinkWatch", "site_rows", "utc_seconds"]

POLL_INTERVAL_S = 30.0


class SuperLinkWatch:
    """Polls the SuperLink in a thread, so that pages never wait for it.

    Args:
        server: Folder of the server.
        control: Client of the SuperLink's control API; made for the server unless given.

    Attributes:
        nodes: Nodes by id, as last reported.
        runs: Status of each run by id, as last reported.
        error: Why `nodes` and `runs` are missing or outdated; empty while the SuperLink responds.
    """

    def __init__(self, server: ServerHome, *, control: FlowerControl | None = None) -> None:
        self._control = control or FlowerControl(server)
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self.nodes: dict[str, Node] = {}
        self.runs: dict[str, str] = {}
        self.error = "the SuperLink has not been polled yet"
        self._thread = threading.Thread(target=self._poll, name="superlink-watch", daemon=True)

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stopped.set()
        self._wake.set()

    def end_status(self, run_id: str) -> str:
        """Return the SuperLink's status of a run that has ended; empty if it has not or is unknown."""
        status = "" if self.error else self.runs.get(run_id, "")
        return status if status.startswith("finished") else ""

    def refresh(self) -> None:
        """Poll at once, because a run was started or stopped."""
        self._wake.set()

    def _poll(self) -> None:
        while not self._stopped.is_set():
            try:
                self.nodes, self.runs, self.error = self._control.nodes(), self._control.runs(), ""
            except ControlError as error:
                self.error = str(error)
            self._wake.wait(POLL_INTERVAL_S)
            self._wake.clear()


def site_rows(
    database: ServerDatabase, watch: SuperLinkWatch, events: Sequence[dict[str, Any]]
) -> list[tuple[str, ...]]:
    """Return a row per site: name, state, status of its node, last contact, version and note."""
    contacts = last_contacts(events)
    versions: dict[str, tuple[float, str]] = {}
    for event in events:
        if event["kind"] == "site_ready" and event.get("version"):
            version = (float(event["time"]), str(event["version"]))
            versions[event["site"]] = max(versions.get(event["site"], (0.0, "")), version)
    rows: list[tuple[str, ...]] = []
    for site in database.sites():
        node = watch.nodes.get(site.keys[-1].node_id) if site.keys else None
        times = [contacts.get(site.name), _parse_time(node.last_seen) if node else None]
        contact = max((time for time in times if time is not None), default=None)
        status = node.status if node else MISSING
        version_text = versions.get(site.name, (0.0, MISSING))[1]
        rows.append((site.name, site.state, status, format_timestamp(contact), version_text, site.note))
    return rows


def _parse_time(text: str) -> float | None:
    try:
        return utc_seconds(datetime.datetime.fromisoformat(text))
    except ValueError:
        return None


def utc_seconds(time: datetime.datetime) -> float:
    """Return a time of the database as seconds since 1970."""
    # SQLite returns times without time zone; all are in UTC.
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
