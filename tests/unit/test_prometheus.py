"""/metrics: what Prometheus reads of runs, by its own parser, and what of them it is not told."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from fedsigma import __version__
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.server.dashboard.pages.prometheus import (
    RunCollector,
    RunMetrics,
    SiteMetrics,
    metrics_page,
)
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.runs.summary import RunSummary, find_runs, summarize_run
from tests.helpers.deploy_files import tool
from tests.helpers.synthetic_run import DOWNLOAD, HOSTILE, UPLOAD, write_synthetic_run

SITES = ["north", "east", "south", "west"]
LABELS = ("study", "run", "site", "status", "state")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def read(place: Path) -> list[RunMetrics]:
    folders = [RunDir.open(path) for path in find_runs(place)]
    return [
        RunMetrics.from_run(summarize_run(one), rows=one.rounds(), events=one.events()) for one in folders
    ]


def page(collector: RunCollector) -> str:
    content, content_type = metrics_page(collector)
    assert content_type.startswith("text/plain")
    return content.decode()


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric by the values of their labels."""
    found = [one for family in parse(text) for one in family.samples if one.name == name]
    by_labels = {tuple(one.labels[x] for x in LABELS if x in one.labels): one.value for one in found}
    assert len(by_labels) == len(found), f"{name} has two samples of the same labels"
    return by_labels


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_synthetic_run(tmp_path / "under-way", name="blood", rounds=10, finished=6)
    write_synthetic_run(tmp_path / "whole", name="skin", rounds=3)
    write_synthetic_run(tmp_path / "broken", name="skin", rounds=5, finished=1, fail="too few sites")
    return tmp_path


def test_metrics_of_runs(place: Path) -> None:
    text, folder = page(RunCollector(lambda: read(place))), RunDir.open(place / "under-way")
    assert values(text, "fedsigma_runs") == {
        ("queued",): 0,
        ("running",): 0,
        ("interrupted",): 1,
        ("finished",): 1,
        ("failed",): 1,
    }
    states = values(text, "fedsigma_run_state")
    assert {key for key, value in states.items() if value} == {
        ("blood", "under-way", "interrupted"),
        ("skin", "whole", "finished"),
        ("skin", "broken", "failed"),
    }
    assert len(states) == 15
    run, about = ("blood", "under-way"), summarize_run(folder)
    assert values(text, "fedsigma_run_rounds_done")[run] == 6
    assert values(text, "fedsigma_run_rounds_planned")[run] == 10
    assert values(text, "fedsigma_run_accuracy_ratio")[run] == about.federated_accuracy
    assert values(text, "fedsigma_run_last_event_timestamp_seconds")[run] == folder.events()[-1]["time"]
    assert values(text, "fedsigma_bytes_received_total")[run] == 6 * 4 * UPLOAD
    assert values(text, "fedsigma_bytes_sent_total")[run] == 6 * 4 * DOWNLOAD
    replies = values(text, "fedsigma_replies_total")
    assert {status: replies[*run, status] for status in ("accepted", "rejected", "late", "failed")} == {
        "accepted": 19,
        "rejected": 3,
        "late": 1,
        "failed": 1,
    }
    (build,) = [one for family in parse(text) for one in family.samples if one.name == "fedsigma_build_info"]
    assert build.labels["version"] == __version__ and build.value == 1


def test_metrics_of_sites_until_the_run_has_finished(place: Path) -> None:
    text, folder = page(RunCollector(lambda: read(place))), RunDir.open(place / "under-way")
    accuracy = values(text, "fedsigma_site_accuracy_ratio")
    assert {run for _, run, _ in accuracy} == {"under-way", "broken"}
    newest = {row["site"]: row for row in folder.rounds() if row["accuracy"] is not None}
    for site in SITES:
        labels = ("blood", "under-way", site)
        assert accuracy[labels] == newest[site]["accuracy"]
        assert values(text, "fedsigma_site_loss")[labels] == newest[site]["loss"]
        assert values(text, "fedsigma_site_bytes_received_total")[labels] == 6 * UPLOAD
        kinds = ("reply_accepted", "reply_rejected")
        answers = [e["time"] for e in folder.events() if e["kind"] in kinds and e["site"] == site]
        assert values(text, "fedsigma_site_last_contact_timestamp_seconds")[labels] == answers[-1]
    assert not values(text, "fedsigma_site_privacy_epsilon")


def test_metrics_of_statuses_and_privacy(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path / "private", "name: private\n")
    folder.log_event("run_start", study="private")
    folder.log_event("site_timed_out", round=1, site="b")
    for site, status in (("a", "accepted"), ("b", "late"), ("c", "rejected")):
        metrics = {"epsilon": 1.5} if status == "accepted" else {}
        folder.log_round(1, site, metrics, 10, 20, status)
    folder.log_round(1, ALL_SITES, {"epsilon": 1.5}, 0, 0, ALL_SITES)
    # The final model: judged, without an exchange of its own.
    folder.log_round(2, "a", {"accuracy": 0.5}, 0, 0, "accepted")
    text = page(RunCollector(lambda: read(tmp_path)))
    assert values(text, "fedsigma_replies_total") == {
        ("private", "private", status): count
        for status, count in {"accepted": 1, "late": 1, "rejected": 1, "failed": 0}.items()
    }
    assert values(text, "fedsigma_site_replies_total")["private", "private", "b", "late"] == 1
    assert values(text, "fedsigma_privacy_epsilon") == {("private", "private"): 1.5}
    assert values(text, "fedsigma_site_privacy_epsilon") == {("private", "private", "a"): 1.5}
    # A site that is late has not been in contact.
    assert not values(text, "fedsigma_site_last_contact_timestamp_seconds")


def test_only_the_newest_runs_have_metrics_of_their_own(tmp_path: Path) -> None:
    runs = [figures(f"/runs/r{number:03d}", started=float(number)) for number in range(120)]
    text = page(RunCollector(lambda: runs, newest=7))
    assert {run for _, run in values(text, "fedsigma_run_rounds_done")} == {f"r{n}" for n in range(113, 120)}
    assert values(text, "fedsigma_runs")["interrupted",] == 120


def test_runs_of_the_same_name_are_distinguished() -> None:
    runs = [figures("/runs/a/x"), figures("/runs/b/x"), figures("/runs/y")]
    assert {run for _, run in values(page(RunCollector(lambda: runs)), "fedsigma_run_rounds_done")} == {
        "a/x",
        "b/x",
        "y",
    }


def test_counters_do_not_decrease_when_a_round_is_repeated() -> None:
    now = [figures("/runs/x", sites={"a": SiteMetrics(bytes_received=500, replies={"accepted": 5})})]
    collector = RunCollector(lambda: now)
    page(collector)
    now[0] = replace(now[0], sites={"a": SiteMetrics(bytes_received=490, replies={"accepted": 4})})
    assert list(values(page(collector), "fedsigma_bytes_received_total").values()) == [500]
    now[0] = replace(now[0], sites={"a": SiteMetrics(bytes_received=600, replies={"accepted": 6})})
    assert list(values(page(collector), "fedsigma_bytes_received_total").values()) == [600]
    # A run that is gone, or finished, is forgotten.
    now.clear()
    assert not values(page(collector), "fedsigma_bytes_received_total")


@given(
    names=st.lists(st.text(min_size=1, max_size=20) | st.sampled_from(HOSTILE), min_size=1, max_size=3),
    number=st.floats(),
)
def test_metrics_page_is_valid_for_any_name_and_number(names: list[str], number: float) -> None:
    site = SiteMetrics(accuracy=number, loss=number, replies=dict.fromkeys(names, 1))
    runs = [
        figures(f"/runs/{index}", study=name, sites=dict.fromkeys(names, site))
        for index, name in enumerate(names)
    ]
    collector = RunCollector(lambda: runs)
    text = page(collector)
    told = values(text, "fedsigma_site_replies_total")
    assert set(told) == {
        (name, str(i), one, s) for i, name in enumerate(names) for one in names for s in names
    }
    content, content_type = metrics_page(collector, accept=OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert {one.name for one in parse_openmetrics(content.decode())} >= {"fedsigma_build", "fedsigma_runs"}


def test_all_metrics_are_described(place: Path) -> None:
    collector = RunCollector(lambda: read(place))
    assert [one.name for one in collector.describe()] == [one.name for one in collector.collect()]
    assert all(one.documentation.endswith(".") for one in collector.describe())


def test_promtool_accepts_the_metrics(place: Path) -> None:
    text = page(RunCollector(lambda: read(place)))
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def figures(path: str, *, study: str = "s", started: float | None = None, **values: Any) -> RunMetrics:
    about = RunSummary(
        path=path,
        study=study,
        state="interrupted",
        reason="",
        rounds_done=1,
        rounds_planned=None,
        sites=1,
        federated_accuracy=None,
        started=started,
        seconds=None,
    )
    return RunMetrics(summary=about, **values)
