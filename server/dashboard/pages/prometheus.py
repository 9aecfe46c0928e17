"""Metrics of runs and sites for Prometheus.

The metrics are computed for each scrape. Label values are bounded: only the newest runs have metrics of their
own, and sites appear only for runs that have not finished.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fedsigma.common import __version__
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.server.runs.summary import RunSummary, last_contacts

__all__ = ["NEWEST", "RunCollector", "RunMetrics", "metrics_page"]

NEWEST = 50
"""Default number of runs with metrics of their own."""
STATES = ("queued", "running", "interrupted", "finished", "failed")
STATUSES = ("accepted", "rejected", "late", "failed")

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SiteMetrics:
    """The metrics of one site of a run; None if not known.

    Attributes:
        replies: Number of replies by status.
        bytes_received: Bytes that the server received from the site in all rounds.
        bytes_sent: Bytes that the server sent to the site in all rounds.
        accuracy: Latest accuracy on the site's test images, 0 to 1.
        loss: Latest mean training loss.
        epsilon: Latest epsilon that the site reported.
        last_contact: Seconds since 1970 of the site's last reply.
    """

    replies: Mapping[str, int] = field(default_factory=dict)
    bytes_received: int = 0
    bytes_sent: int = 0
    accuracy: float | None = None
    loss: float | None = None
    epsilon: float | None = None
    last_contact: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """The metrics of one run; None if not known.

    Attributes:
        summary: State, progress and times of the run.
        loss: Latest mean training loss of all sites.
        epsilon: Latest epsilon, the largest of any site.
        last_event: Seconds since 1970 of the last event.
        sites: Metrics of each site by name.
    """

    summary: RunSummary
    loss: float | None = None
    epsilon: float | None = None
    last_event: float | None = None
    sites: Mapping[str, SiteMetrics] = field(default_factory=dict)

    @classmethod
    def from_run(cls, summary: RunSummary, *, rows: Sequence[Row], events: Sequence[Row]) -> RunMetrics:
        """Compute the metrics of a run from its rows of rounds.csv and its events, both oldest first."""
        contacts = last_contacts(events)
        times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
        by_site: dict[str, list[Row]] = {site: [] for site in contacts}
        for row in rows:
            by_site.setdefault(str(row["site"]), []).append(row)
        all_sites = by_site.pop(ALL_SITES, [])
        return cls(
            summary=summary,
            loss=_latest(all_sites, "loss"),
            epsilon=_latest(all_sites, "epsilon"),
            last_event=times[-1] if times else None,
            sites={site: _site_metrics(rows, contacts.get(site)) for site, rows in by_site.items()},
        )


def _site_metrics(rows: Sequence[Row], contact: float | None) -> SiteMetrics:
    # The rows that evaluate the final model belong to no exchange.
    exchanges = [row for row in rows if row["bytes_up"] or row["status"] != "accepted"]
    return SiteMetrics(
        # Include zeros: Prometheus sees no increase of a counter that starts at 1.
        replies=dict.fromkeys(STATUSES, 0) | Counter(str(row["status"]) for row in exchanges),
        bytes_received=sum(row["bytes_up"] for row in rows),
        bytes_sent=sum(row["bytes_down"] for row in rows),
        accuracy=_latest(rows, "accuracy"),
        loss=_latest(rows, "loss"),
        epsilon=_latest(rows, "epsilon"),
        last_contact=contact,
    )


def _latest(rows: Sequence[Row], name: str) -> float | None:
    values = (row.get(name) for row in reversed(rows))
    return next((float(value) for value in values if value is not None), None)


_RUN, _SITE = ("study", "run"), ("study", "run", "site")
# Name, attribute of `RunMetrics` or `SiteMetrics`, and description of each gauge.
_RUN_GAUGES = (
    ("fedsigma_run_rounds_done", "summary.rounds_done", "Finished rounds."),
    ("fedsigma_run_rounds_planned", "summary.rounds_planned", "Planned rounds."),
    (
        "fedsigma_run_accuracy_ratio",
        "summary.federated_accuracy",
        "Latest accuracy over the test images of all sites.",
    ),
    ("fedsigma_run_loss", "loss", "Mean training loss of all sites in the latest round."),
    ("fedsigma_run_started_timestamp_seconds", "summary.started", "Start of the run."),
    ("fedsigma_run_last_event_timestamp_seconds", "last_event", "Time of the latest event of the run."),
    (
        "fedsigma_run_duration_seconds",
        "summary.seconds",
        "Time from the start of the run to its latest event.",
    ),
    ("fedsigma_run_sites", "summary.sites", "Number of sites in the run."),
    ("fedsigma_privacy_epsilon", "epsilon", "Epsilon spent, the largest of any site."),
)
_SITE_GAUGES = (
    ("fedsigma_site_accuracy_ratio", "accuracy", "Latest accuracy on the test images of a site."),
    ("fedsigma_site_loss", "loss", "Mean training loss of a site in the latest round."),
    ("fedsigma_site_last_contact_timestamp_seconds", "last_contact", "Time of the last reply of a site."),
    ("fedsigma_site_privacy_epsilon", "epsilon", "Epsilon spent by a site."),
)
_COUNTERS = (
    ("fedsigma_bytes_received", "Bytes received from all sites in training rounds.", _RUN),
    ("fedsigma_bytes_sent", "Bytes sent to all sites in training rounds.", _RUN),
    ("fedsigma_replies", "Replies of all sites by status.", (*_RUN, "status")),
    ("fedsigma_site_bytes_received", "Bytes received from a site in training rounds.", _SITE),
    ("fedsigma_site_bytes_sent", "Bytes sent to a site in training rounds.", _SITE),
    ("fedsigma_site_replies", "Replies of a site by status.", (*_SITE, "status")),
)


def _families() -> dict[str, Any]:
    """Return all metrics without values, by name."""
    families: list[Any] = [
        InfoMetricFamily("fedsigma_build", "Version of FedSigma and of Python."),
        GaugeMetricFamily("fedsigma_runs", "Number of runs by state.", labels=("state",)),
        GaugeMetricFamily(
            "fedsigma_run_state", "1 for the current state of a run, else 0.", labels=(*_RUN, "state")
        ),
        *(GaugeMetricFamily(name, text, labels=_RUN) for name, _, text in _RUN_GAUGES),
        *(GaugeMetricFamily(name, text, labels=_SITE) for name, _, text in _SITE_GAUGES),
        *(CounterMetricFamily(name, text, labels=labels) for name, text, labels in _COUNTERS),
    ]
    return {family.name: family for family in families}


class RunCollector(Collector):
    """Collects the metrics of all runs for Prometheus.

    Args:
        read: Returns the metrics of all runs; called at each scrape.
        newest: Number of runs with metrics of their own, the most recently started.
    """

    def __init__(self, read: Callable[[], Iterable[RunMetrics]], *, newest: int = NEWEST) -> None:
        self._read, self._newest = read, newest
        self._highest: dict[tuple[str, ...], float] = {}

    def describe(self) -> Iterable[Metric]:
        """Return all metrics without values."""
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        runs = sorted(self._read(), key=lambda run: run.summary.started or 0.0, reverse=True)
        families = _families()
        families["fedsigma_build"].add_metric(
            [], {"version": __version__, "python": platform.python_version()}
        )
        states = Counter(run.summary.state for run in runs)
        for state in STATES:
            families["fedsigma_runs"].add_metric([state], states[state])
        newest = runs[: self._newest]
        counts: Counter[tuple[str, ...]] = Counter()
        for run, name in zip(newest, _run_names(newest), strict=True):
            labels = [run.summary.study, name]
            for state in STATES:
                families["fedsigma_run_state"].add_metric([*labels, state], float(run.summary.state == state))
            _add(families, _RUN_GAUGES, labels, run)
            _count(counts, run, labels)
            if run.summary.state != "finished":
                for site, metrics in run.sites.items():
                    _add(families, _SITE_GAUGES, [*labels, site], metrics)
        # No count is below its previous value: a repeated round replaces its rows.
        self._highest = {key: max(value, self._highest.get(key, 0)) for key, value in counts.items()}
        for (family, *labels), value in self._highest.items():
            families[family].add_metric(labels, value)
        return families.values()


def _add(
    families: dict[str, Any],
    gauges: Sequence[tuple[str, str, str]],
    labels: Sequence[str],
    metrics: RunMetrics | SiteMetrics,
) -> None:
    for name, attribute, _ in gauges:
        value = attrgetter(attribute)(metrics)
        if value is not None and math.isfinite(value):
            families[name].add_metric(labels, float(value))


def _count(counts: Counter[tuple[str, ...]], run: RunMetrics, labels: Sequence[str]) -> None:
    """Add the counts of a run, and of its sites unless it has finished."""
    for kind in ("bytes_received", "bytes_sent"):
        counts[f"fedsigma_{kind}", *labels] = 0
    for name, site in run.sites.items():
        values = {("bytes_received",): site.bytes_received, ("bytes_sent",): site.bytes_sent}
        replies = {("replies", status): count for status, count in site.replies.items()}
        for (kind, *status), value in (values | replies).items():
            counts[f"fedsigma_{kind}", *labels, *status] += value
            if run.summary.state != "finished":
                counts[f"fedsigma_site_{kind}", *labels, name, *status] = value


def metrics_page(collector: RunCollector, *, accept: str = "") -> tuple[bytes, str]:
    """Return the page for a scrape and its content type; the header `accept` selects the format."""
    registry = CollectorRegistry()
    registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def _run_names(runs: Sequence[RunMetrics]) -> list[str]:
    """Return the folder name of each run, with its parent folder where two names are equal."""
    paths = [Path(run.summary.path) for run in runs]
    counts = Counter(path.name for path in paths)
    return [path.name if counts[path.name] == 1 else "/".join(path.parts[-2:]) for path in paths]
