"""What a server has beside its run folders: studies that wait, sites, and what the SuperLink says of both."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsigma.server.deployment.database import ServerDatabase, Site
from fedsigma.server.deployment.flower_control import ControlError, FlowerControl, Node, Run
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.runs.summary import last_contacts

__all__ = ["SiteLine", "SuperLinkWatch", "site_lines"]

ASK_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SiteLine:
    """A site of the server.

    state: `invited`, `joined` or `revoked`; node: what the SuperLink says of its node; contact: seconds since
    1970 of the last thing heard of it, by a study or by the SuperLink; version: of FedSigma there.
    """

    name: str
    state: str
    node: str
    contact: float | None
    version: str
    note: str


class SuperLinkWatch:
    """Asks the SuperLink now and then, in a thread of its own: pages never wait for it."""

    def __init__(self, folder: ServerHome, *, control: FlowerControl | None = None) -> None:
        self._control = control or FlowerControl(folder)
        self._ended = threading.Event()
        self._asked = threading.Event()
        self.nodes: dict[str, Node] = {}
        self.runs: dict[str, Run] = {}
        self.problem = "it has not been asked yet"
        """Why the SuperLink's word is missing or old; empty while it answers."""
        self._thread = threading.Thread(target=self._ask_on, name="superlink-watch", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._asked.set()

    def ended(self, run_id: str) -> str:
        """How a run ended, by the SuperLink's word; empty while it goes on, or is not known to have."""
        run = None if self.problem else self.runs.get(run_id)
        return run.status if run is not None and run.ended else ""

    def soon(self) -> None:
        """Ask again now: something was started or stopped."""
        self._asked.set()

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            try:
                self.nodes, self.runs, self.problem = self._control.nodes(), self._control.runs(), ""
            except ControlError as error:
                self.problem = str(error)
            self._asked.wait(ASK_EVERY_S)
            self._asked.clear()


def site_lines(
    registry: ServerDatabase, watch: SuperLinkWatch | None, events: Sequence[dict[str, Any]]
) -> list[SiteLine]:
    """The server's sites.

    Args:
        registry: the server's.
        watch: what the SuperLink says.
        events: of runs; those that name a site tell when it was heard of, and by `site_ready` its version.
    """
    heard = last_contacts(events)
    versions: dict[str, tuple[float, str]] = {}
    for event in events:
        if event["kind"] == "site_ready" and event.get("version"):
            told = (float(event["time"]), str(event["version"]))
            versions[event["site"]] = max(versions.get(event["site"], (0.0, "")), told)
    nodes = watch.nodes if watch else {}
    return [
        _site(one, nodes, heard.get(one.name), versions.get(one.name, (0.0, ""))[1])
        for one in registry.sites()
    ]


def _site(site: Site, nodes: dict[str, Node], heard: float | None, version: str) -> SiteLine:
    node = nodes.get(site.keys[-1].node_id) if site.keys else None
    times = [time for time in (heard, _parsed(node.last_seen) if node else None) if time is not None]
    return SiteLine(
        name=site.name,
        state=site.state,
        node=node.status if node else "",
        contact=max(times, default=None),
        version=version,
        note=site.note,
    )


def _parsed(text: str) -> float | None:
    try:
        return utc_seconds(datetime.datetime.fromisoformat(text))
    except ValueError:
        return None


def utc_seconds(moment: datetime.datetime) -> float:
    """Seconds since 1970 of a time of the database."""
    # SQLite gives back times without their zone; all are in UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
