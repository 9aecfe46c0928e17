"""deploy/: what Prometheus and Grafana are given, against the metrics that there are."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.server.dashboard.pages.prometheus import RunCollector
from fedsigma.server.runs.run_dir import RunDir
from tests.deployment.test_deploy_files import YAMLLINT
from tests.helpers.deploy_files import DEPLOY, passes, tool
from tests.helpers.synthetic_run import write_synthetic_run
from tests.unit.test_prometheus import read

PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "fedsigma.json"
# What Prometheus adds to every series.
ITS_OWN = {"job", "instance"}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of each metric that the collector gives."""
    place = tmp_path_factory.mktemp("runs")
    write_synthetic_run(place / "blood", finished=6)
    private = RunDir.create(place / "private", "name: private\n")
    for site in ("a", ALL_SITES):
        private.log_round(1, site, {"epsilon": 1.5, "loss": 0.5}, 1, 1, "accepted")
    found: dict[str, set[str]] = {"up": set()}
    for family in RunCollector(lambda: read(place)).collect():
        assert family.samples, f"{family.name}: the runs here have no value of it"
        for sample in family.samples:
            found[sample.name] = set(sample.labels)
    return found


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def panel_expressions() -> Iterator[tuple[str, str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            yield panel["title"], expression, target["legendFormat"]


def selectors(expression: str) -> list[promql.VectorSelector]:
    """All metrics that an expression asks for, by a parser of PromQL."""
    found = []

    def look(node: Any) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql.walk(promql.parse(expression), look)
    return found


def labels_of(expression: str, metrics: dict[str, set[str]]) -> set[str]:
    """The labels that an expression may use; fails at a metric or label that there is not."""
    asked = selectors(expression)
    assert asked, expression
    known: set[str] = set(ITS_OWN)
    for one in asked:
        assert one.name in metrics, f"{one.name} in {expression}"
        named = {matcher.name for matcher in one.matchers.matchers}
        assert named <= metrics[one.name] | ITS_OWN, f"{named} of {one.name}"
        known |= metrics[one.name]
    for words in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        grouped = {word.strip() for word in words.split(",")}
        assert grouped <= known, f"{grouped - known} in {expression}"
    return known


# ---- Grafana


def test_every_panel_asks_for_metrics_and_labels_that_there_are(metrics: dict[str, set[str]]) -> None:
    for title, expression, legend in panel_expressions():
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert shown <= labels_of(expression, metrics), title


def test_every_metric_is_on_the_dashboard_or_in_an_alert(metrics: dict[str, set[str]]) -> None:
    expressions = [one for _, one, _ in panel_expressions()] + [rule["expr"] for rule in alerts()]
    asked = {selector.name for one in expressions for selector in selectors(one)}
    assert set(metrics) - asked == {"fedsigma_build_info", "fedsigma_run_started_timestamp_seconds"}


def test_the_variables_are_labels_and_the_panels_use_them(metrics: dict[str, set[str]]) -> None:
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert set(variables) == {"datasource", "study", "run"}
    for name in ("study", "run"):
        match = re.fullmatch(r"label_values\(([^,]+), (\w+)\)", variables[name]["query"]["query"])
        assert match and match[2] == name and name in labels_of(match[1], metrics)
    for panel in dashboard()["panels"]:
        uids = {panel["datasource"]["uid"], *(one["datasource"]["uid"] for one in panel["targets"])}
        assert uids == {"${datasource}"}
    chosen = [one for _, one, _ in panel_expressions() if "fedsigma_runs{" not in one]
    assert all('study=~"$study", run=~"$run"' in one for one in chosen)


def test_grafana_dashboard_has_a_valid_layout() -> None:
    found = dashboard()
    assert found["schemaVersion"] >= 39 and found["uid"] == "fedsigma" and "id" not in found
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    squares: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not covered & squares, panel["title"]
        squares |= covered
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


# ---- Prometheus


def test_alerts_are_of_metrics_and_labels_that_there_are(metrics: dict[str, set[str]]) -> None:
    for rule in alerts():
        known = labels_of(rule["expr"], metrics)
        texts = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= known, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_prometheus_takes_the_files() -> None:
    promtool = tool("promtool")
    passes(promtool, "check", "rules", PROMETHEUS / "alerts.yml")
    passes(promtool, "check", "config", "--syntax-only", PROMETHEUS / "fedsigma.yml")


@pytest.mark.parametrize("name", ["fedsigma.yml", "alerts.yml"])
def test_the_files_are_yaml_in_good_order(name: str) -> None:
    passes(tool("yamllint"), "--strict", "-d", YAMLLINT, PROMETHEUS / name)


def test_a_scrape_is_encrypted_and_names_no_secret() -> None:
    found = yaml.safe_load((PROMETHEUS / "fedsigma.yml").read_text(encoding="utf-8"))
    (job,) = found["scrape_configs"]
    assert job["scheme"] == "https" and "insecure_skip_verify" not in job["tls_config"]
    assert set(job["authorization"]) == {"type", "credentials_file"}
    assert f'job="{job["job_name"]}"' in alerts()[0]["expr"] and found["rule_files"] == ["alerts.yml"]


LABELS = 'job="fedsigma", instance="c", study="s", run="r"'
CASES = {
    # name: series (over 12 hours, one value each half hour), what fires at the end
    "a failed run": ({"state": "failed", "last_event": "36000"}, {"FedSigmaRunFailed"}),
    "a run that failed long ago": ({"state": "failed", "last_event": "-86400"}, set()),
    "a run that goes on": ({"state": "running", "last_event": "43000", "contact": "43000"}, set()),
    "an interrupted run": (
        {"state": "running", "last_event": "3600", "contact": "3600"},
        {"FedSigmaRunSilent"},
    ),
    "a site that is away": (
        {"state": "running", "last_event": "43000", "contact": "3600"},
        {"FedSigmaSiteSilent"},
    ),
    "a site that is refused": (
        {"state": "running", "last_event": "43000", "contact": "43000", "rejected": "0x18 1 2 3 4 5 6"},
        {"FedSigmaRepliesRefused"},
    ),
    "no metrics": ({"up": "0"}, {"FedSigmaNoMetrics"}),
}


@pytest.mark.parametrize("case", CASES)
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path, case: str) -> None:
    promtool = tool("promtool")
    given, expected = CASES[case]
    names = {
        "up": 'up{job="fedsigma", instance="c"}',
        "state": f'fedsigma_run_state{{{LABELS}, state="{given.get("state")}"}}',
        "last_event": f"fedsigma_run_last_event_timestamp_seconds{{{LABELS}}}",
        "contact": f'fedsigma_site_last_contact_timestamp_seconds{{{LABELS}, site="a"}}',
        "rejected": f'fedsigma_site_replies_total{{{LABELS}, site="a", status="rejected"}}',
    }
    values = given | ({"state": "1"} if "state" in given else {})
    series = [
        {"series": names[name], "values": value if " " in value else f"{value}x24"}
        for name, value in values.items()
    ]
    # That an alert fires is asked of its expression: promtool wants all texts of an alert word by word.
    asked = [
        {
            "expr": f"count({rule['expr']}) or vector(0)",
            "eval_time": "12h",
            "exp_samples": [{"labels": "{}", "value": int(rule["alert"] in expected)}],
        }
        for rule in alerts()
    ]
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    tests = {"rule_files": ["alerts.yml"], "evaluation_interval": "30m"}
    tests["tests"] = [{"interval": "30m", "input_series": series, "promql_expr_test": asked}]  # type: ignore[assignment]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    passes(promtool, "test", "rules", tmp_path / "tests.yml")
