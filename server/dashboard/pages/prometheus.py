"""What Prometheus can ask of a server: its runs, and the sites of those that are under way.

The metrics are made anew for each scrape, from figures that the caller reads. Labels are bounded: runs are
the newest ones, and sites appear for runs that have not finished.
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
from fedsigma.server.runs.rounds_table import ALL_SITES
from fedsigma.server.runs.summary import RunSummary, last_contacts

__all__ = ["NEWEST", "RunCollector", "RunFigures", "metrics_page"]

NEWEST = 50
"""Runs that are told one by one, unless said otherwise."""
STATES = ("queued", "running", "interrupted", "finished", "failed")
STATUSES = ("accepted", "rejected", "late", "failed")

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SiteFigures:
    """One site of a run.

    Units: bytes_received and bytes_sent in bytes, seen from the server, over all rounds; accuracy between 0
    and 1; last_contact in seconds since 1970. None is not known.
    """

    replies: Mapping[str, int] = field(default_factory=dict)  # by status
    bytes_received: int = 0
    bytes_sent: int = 0
    accuracy: float | None = None
    loss: float | None = None
    epsilon: float | None = None
    last_contact: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run: its overview, the newest figures of all sites together, and each site's."""

    overview: RunSummary
    loss: float | None = None
    epsilon: float | None = None
    last_event: float | None = None
    sites: Mapping[str, SiteFigures] = field(default_factory=dict)

    @classmethod
    def of(cls, overview: RunSummary, *, rows: Sequence[Row], events: Sequence[Row]) -> RunFigures:
        """Gather them from the rows and events of a run, in the order in which they were written."""
        heard = last_contacts(events)
        times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
        by_site: dict[str, list[Row]] = {site: [] for site in heard}
        for row in rows:
            by_site.setdefault(str(row["site"]), []).append(row)
        pooled = by_site.pop(ALL_SITES, [])
        return cls(
            overview=overview,
            loss=_newest(pooled, "loss"),
            epsilon=_newest(pooled, "epsilon"),
            last_event=times[-1] if times else None,
            sites={site: _site(found, heard.get(site)) for site, found in by_site.items()},
        )


def _site(rows: Sequence[Row], contact: float | None) -> SiteFigures:
    # The final model's rows have no exchange of their own.
    asked = [row for row in rows if row["bytes_up"] or row["status"] != "accepted"]
    return SiteFigures(
        # With zeros: of a counter that begins at 1, Prometheus sees no increase.
        replies=dict.fromkeys(STATUSES, 0) | Counter(str(row["status"]) for row in asked),
        bytes_received=sum(row["bytes_up"] for row in rows),
        bytes_sent=sum(row["bytes_down"] for row in rows),
        accuracy=_newest(rows, "accuracy"),
        loss=_newest(rows, "loss"),
        epsilon=_newest(rows, "epsilon"),
        last_contact=contact,
    )


def _newest(rows: Sequence[Row], name: str) -> float | None:
    known = (row.get(name) for row in reversed(rows))
    return next((float(value) for value in known if value is not None), None)


class RunCollector(Collector):
    """The metrics of a directory of runs, or of a server.

    Args:
        read: gives the figures of all runs; called at each scrape.
        newest: how many runs are told one by one, the newest by their start.
    """

    def __init__(self, read: Callable[[], Iterable[RunFigures]], *, newest: int = NEWEST) -> None:
        self._read, self._newest = read, newest
        self._highest: dict[tuple[str, ...], float] = {}

    def describe(self) -> Iterator[Metric]:
        """All metrics there are, without values."""
        yield from _Families().all()

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        runs = sorted(self._read(), key=lambda run: run.overview.started or 0.0, reverse=True)
        families = _Families()
        families.build.add_metric([], {"version": __version__, "python": platform.python_version()})
        states = Counter(run.overview.state for run in runs)
        for state in STATES:
            families.runs.add_metric([state], states[state])
        told = runs[: self._newest]
        counts: dict[tuple[str, ...], float] = {}
        for run, name in zip(told, _names(told), strict=True):
            families.add_run(run, [run.overview.study, name], counts)
            if run.overview.state != "finished":
                for site, figures in run.sites.items():
                    families.add_site(figures, [run.overview.study, name, site], counts)
        for (family, *labels), value in self._rising(counts).items():
            families.counter(family).add_metric(labels, value)
        yield from families.all()

    def _rising(self, counts: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
        """The counts, none of them below what it was before: a round that is repeated replaces its rows."""
        self._highest = {key: max(value, self._highest.get(key, 0)) for key, value in counts.items()}
        return self._highest


def metrics_page(collector: RunCollector, *, accept: str = "") -> tuple[bytes, str]:
    """The page for a scrape, and its content type, in the format that the header Accept asks for."""
    registry = CollectorRegistry()
    registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def _names(runs: Sequence[RunFigures]) -> list[str]:
    """What each run is called: its folder's name, with the parent's where two are of one name."""
    paths = [Path(run.overview.path) for run in runs]
    often = Counter(path.name for path in paths)
    return [path.name if often[path.name] == 1 else "/".join(path.parts[-2:]) for path in paths]


_RUN, _SITE = ("study", "run"), ("study", "run", "site")


class _Families:
    """All metrics, to be filled for one scrape."""

    def __init__(self) -> None:
        self.build = InfoMetricFamily("fedsigma_build", "Version of FedSigma and of Python.")
        self.runs = _gauge("fedsigma_runs", "Runs, all of them, by state.", ("state",))
        about = {
            "fedsigma_run_state": ("1 for the state that a run is in, else 0.", (*_RUN, "state")),
            "fedsigma_run_rounds_done": ("Rounds that have ended.", _RUN),
            "fedsigma_run_rounds_planned": ("Rounds that the study asks for.", _RUN),
            "fedsigma_run_accuracy_ratio": ("Accuracy over all sites' test images, newest model.", _RUN),
            "fedsigma_run_loss": ("Mean training loss of all sites, newest round.", _RUN),
            "fedsigma_run_started_timestamp_seconds": ("When the run began.", _RUN),
            "fedsigma_run_last_event_timestamp_seconds": ("When the run last wrote an event.", _RUN),
            "fedsigma_run_duration_seconds": ("From the run's beginning to its newest event.", _RUN),
            "fedsigma_run_sites": ("Sites that have been asked.", _RUN),
            "fedsigma_privacy_epsilon": ("Privacy spent, the most of any site.", _RUN),
            "fedsigma_site_accuracy_ratio": ("Accuracy on a site's own test images.", _SITE),
            "fedsigma_site_loss": ("Mean training loss of a site, newest round.", _SITE),
            "fedsigma_site_last_contact_timestamp_seconds": ("When a site last answered.", _SITE),
            "fedsigma_site_privacy_epsilon": ("Privacy spent of a site's images.", _SITE),
        }
        self._gauges = {name: _gauge(name, text, labels) for name, (text, labels) in about.items()}
        counted = {
            "fedsigma_bytes_received": ("Bytes that came from sites in training rounds.", _RUN),
            "fedsigma_bytes_sent": ("Bytes that went to sites in training rounds.", _RUN),
            "fedsigma_replies": ("Sites' replies by what came of them.", (*_RUN, "status")),
            "fedsigma_site_bytes_received": ("Bytes that came from a site in training rounds.", _SITE),
            "fedsigma_site_bytes_sent": ("Bytes that went to a site in training rounds.", _SITE),
            "fedsigma_site_replies": ("A site's replies by what came of them.", (*_SITE, "status")),
        }
        self._counters = {
            name: CounterMetricFamily(name, text, labels=labels) for name, (text, labels) in counted.items()
        }

    def all(self) -> Iterator[Metric]:
        yield from (self.build, self.runs, *self._gauges.values(), *self._counters.values())

    def counter(self, name: str) -> CounterMetricFamily:
        return self._counters[name]

    def add_run(self, run: RunFigures, labels: list[str], counts: dict[tuple[str, ...], float]) -> None:
        about, sites = run.overview, list(run.sites.values())
        for state in STATES:
            self._gauges["fedsigma_run_state"].add_metric([*labels, state], float(about.state == state))
        values = {
            "fedsigma_run_rounds_done": about.rounds_done,
            "fedsigma_run_rounds_planned": about.rounds_planned,
            "fedsigma_run_accuracy_ratio": about.federated_accuracy,
            "fedsigma_run_loss": run.loss,
            "fedsigma_run_started_timestamp_seconds": about.started,
            "fedsigma_run_last_event_timestamp_seconds": run.last_event,
            "fedsigma_run_duration_seconds": about.seconds,
            "fedsigma_run_sites": about.sites,
            "fedsigma_privacy_epsilon": run.epsilon,
        }
        self._add(values, labels)
        counts["fedsigma_bytes_received", *labels] = sum(one.bytes_received for one in sites)
        counts["fedsigma_bytes_sent", *labels] = sum(one.bytes_sent for one in sites)
        for site in sites:
            for status, count in site.replies.items():
                key = ("fedsigma_replies", *labels, status)
                counts[key] = counts.get(key, 0) + count

    def add_site(self, site: SiteFigures, labels: list[str], counts: dict[tuple[str, ...], float]) -> None:
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
