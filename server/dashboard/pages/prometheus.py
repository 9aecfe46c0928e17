"""Metrics of runs and sites for Prometheus.

The metrics are computed for each scrape. Label values are bounded: only the newest runs have metrics of their
own, and sites appear only for runs that have not finished.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        """Compute the metrics from the files of a run.

        Args:
            summary: State, progress and times of the run.
            rows: Rows of rounds.csv, in the order in which they were written.
            events: Events of the run, in the order in which they were written.
        """
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


class RunCollector(Collector):
    """Collects the metrics of all runs for Prometheus.

    Args:
        read: Returns the metrics of all runs; called at each scrape.
        newest: Number of runs with metrics of their own, the most recently started.
    """

    def __init__(self, read: Callable[[], Iterable[RunMetrics]], *, newest: int = NEWEST) -> None:
        self._read, self._newest = read, newest
        self._highest: dict[tuple[str, ...], float] = {}

    def describe(self) -> Iterator[Metric]:
        """Yield all metrics without values."""
        yield from _Families().all()

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        runs = sorted(self._read(), key=lambda run: run.summary.started or 0.0, reverse=True)
        families = _Families()
        families.build.add_metric([], {"version": __version__, "python": platform.python_version()})
        states = Counter(run.summary.state for run in runs)
        for state in STATES:
            families.runs.add_metric([state], states[state])
        newest = runs[: self._newest]
        counts: dict[tuple[str, ...], float] = {}
        for run, name in zip(newest, _run_names(newest), strict=True):
            families.add_run(run, [run.summary.study, name], counts)
            if run.summary.state != "finished":
                for site, metrics in run.sites.items():
                    families.add_site(metrics, [run.summary.study, name, site], counts)
        for (family, *labels), value in self._monotonic(counts).items():
            families.counter(family).add_metric(labels, value)
        yield from families.all()

    def _monotonic(self, counts: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
        """Return the counts, none below its previous value: a repeated round replaces its rows."""
        self._highest = {key: max(value, self._highest.get(key, 0)) for key, value in counts.items()}
        return self._highest


def metrics_page(collector: RunCollector, *, accept: str = "") -> tuple[bytes, str]:
    """Return the page for a scrape and its content type.

    Args:
        collector: Source of the metrics.
        accept: Header `Accept` of the request, which selects the format.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def _run_names(runs: Sequence[RunMetrics]) -> list[str]:
    """Return the folder name of each run, with its parent folder where two names are equal."""
    paths = [Path(run.summary.path) for run in runs]
    counts = Counter(path.name for path in paths)
    return [path.name if counts[path.name] == 1 else "/".join(path.parts[-2:]) for path in paths]


_RUN, _SITE = ("study", "run"), ("study", "run", "site")


class _Families:
    """All metrics of one scrape."""

    def __init__(self) -> None:
        self.build = InfoMetricFamily("fedsigma_build", "Version of FedSigma and of Python.")
        self.runs = _gauge("fedsigma_runs", "Number of runs by state.", ("state",))
        gauges = {
            "fedsigma_run_state": ("1 for the current state of a run, else 0.", (*_RUN, "state")),
            "fedsigma_run_rounds_done": ("Finished rounds.", _RUN),
            "fedsigma_run_rounds_planned": ("Planned rounds.", _RUN),
            "fedsigma_run_accuracy_ratio": ("Latest accuracy over the test images of all sites.", _RUN),
            "fedsigma_run_loss": ("Mean training loss of all sites in the latest round.", _RUN),
            "fedsigma_run_started_timestamp_seconds": ("Start of the run.", _RUN),
            "fedsigma_run_last_event_timestamp_seconds": ("Time of the latest event of the run.", _RUN),
            "fedsigma_run_duration_seconds": ("Time from the start of the run to its latest event.", _RUN),
            "fedsigma_run_sites": ("Number of sites in the run.", _RUN),
            "fedsigma_privacy_epsilon": ("Epsilon spent, the largest of any site.", _RUN),
            "fedsigma_site_accuracy_ratio": ("Latest accuracy on the test images of a site.", _SITE),
            "fedsigma_site_loss": ("Mean training loss of a site in the latest round.", _SITE),
            "fedsigma_site_last_contact_timestamp_seconds": ("Time of the last reply of a site.", _SITE),
            "fedsigma_site_privacy_epsilon": ("Epsilon spent by a site.", _SITE),
        }
        self._gauges = {name: _gauge(name, text, labels) for name, (text, labels) in gauges.items()}
        counters = {
            "fedsigma_bytes_received": ("Bytes received from all sites in training rounds.", _RUN),
            "fedsigma_bytes_sent": ("Bytes sent to all sites in training rounds.", _RUN),
            "fedsigma_replies": ("Replies of all sites by status.", (*_RUN, "status")),
            "fedsigma_site_bytes_received": ("Bytes received from a site in training rounds.", _SITE),
            "fedsigma_site_bytes_sent": ("Bytes sent to a site in training rounds.", _SITE),
            "fedsigma_site_replies": ("Replies of a site by status.", (*_SITE, "status")),
        }
        self._counters = {
            name: CounterMetricFamily(name, text, labels=labels) for name, (text, labels) in counters.items()
        }

    def all(self) -> Iterator[Metric]:
        yield from (self.build, self.runs, *self._gauges.values(), *self._counters.values())

    def counter(self, name: str) -> CounterMetricFamily:
        return self._counters[name]

    def add_run(self, run: RunMetrics, labels: list[str], counts: dict[tuple[str, ...], float]) -> None:
        summary, sites = run.summary, list(run.sites.values())
        for state in STATES:
            self._gauges["fedsigma_run_state"].add_metric([*labels, state], float(summary.state == state))
        values = {
            "fedsigma_run_rounds_done": summary.rounds_done,
            "fedsigma_run_rounds_planned": summary.rounds_planned,
            "fedsigma_run_accuracy_ratio": summary.federated_accuracy,
            "fedsigma_run_loss": run.loss,
            "fedsigma_run_started_timestamp_seconds": summary.started,
            "fedsigma_run_last_event_timestamp_seconds": run.last_event,
            "fedsigma_run_duration_seconds": summary.seconds,
            "fedsigma_run_sites": summary.sites,
            "fedsigma_privacy_epsilon": run.epsilon,
        }
        self._add(values, labels)
        counts["fedsigma_bytes_received", *labels] = sum(site.bytes_received for site in sites)
        counts["fedsigma_bytes_sent", *labels] = sum(site.bytes_sent for site in sites)
        for site in sites:
            for status, count in site.replies.items():
                key = ("fedsigma_replies", *labels, status)
                counts[key] = counts.get(key, 0) + count

    def add_site(self, site: SiteMetrics, labels: list[str], counts: dict[tuple[str, ...], float]) -> None:
        values = {
            "fedsigma_site_accuracy_ratio": site.accuracy,
            "fedsigma_site_loss": site.loss,
            "fedsigma_site_last_contact_timestamp_seconds": site.last_contact,
            "fedsigma_site_privacy_epsilon": site.epsilon,
        }
        self._add(values, labels)
        counts["fedsigma_site_bytes_received", *labels] = site.bytes_received
        counts["fedsigma_site_bytes_sent", *labels] = site.bytes_sent
        for status, count in site.replies.items():
            counts["fedsigma_site_replies", *labels, status] = count

    def _add(self, values: Mapping[str, float | None], labels: list[str]) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._gauges[name].add_metric(labels, float(value))


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
