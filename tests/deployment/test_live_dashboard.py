"""The dashboard of a real server, in a real browser, while real sites train."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.dashboard.config import DashboardConfig
from tests.deployment.network import SERVER
from tests.deployment.parts import BIN, SITES, STUDY, Deployment, missing, wait_for
from tests.helpers.browser import MISSING

WHY = missing() or MISSING
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY), reason=WHY or "it is"),
]
PASSWORD = "a horse of another colour"


@pytest.fixture(scope="module")
def seen(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two people saw: a study watched to its end, another stopped."""
    folder = tmp_path_factory.mktemp("dashboard")
    for name, role in (("olga", "operator"), ("vera", "viewer")):
        command = [*deployment.network.inside(SERVER), str(BIN / "fedsigma"), "users", "add", name]
        command += ["--role", role, "--password-stdin", "-f", str(deployment.server.path)]
        subprocess.run(command, input=PASSWORD + "\n", text=True, check=True, env=deployment.environment)
    study = folder / "study.yaml"
    study.write_text(STUDY.replace("seed: 1", "seed: 8"))
    address = DashboardConfig.read(deployment.server.path).access.origins[0]
    script = Path(__file__).with_name("browse.py")
    trust = deployment.server.tls("sites.crt")
    told = deployment.python(SERVER, script, address, study, PASSWORD, folder, trust)
    return dict(json.loads(told[-1]))


def test_a_study_started_in_the_browser_is_watched_to_its_end(seen: dict[str, Any]) -> None:
    watched = seen["watched"]
    assert {"running", "finished"} <= set(watched["states"])
    assert {"1 of 2", "2 of 2"} <= set(watched["rounds"])
    assert watched["mark"] == "never loaded again"
    assert watched["points"] == {**dict.fromkeys(SITES, 3), "All sites": 3}
    assert watched["updates"] == 3
    for site in SITES:
        assert f"{site}\taccepted in round 3\t0" in watched["sites"]
    assert "of the bytes of full fine-tuning" in watched["numbers"]


def test_sites_are_seen_online_with_their_version(seen: dict[str, Any]) -> None:
    from fedsigma import __version__

    lines = [line.split("\t") for line in seen["sites"].splitlines() if line.startswith(SITES)]
    assert [(name, state, node) for name, state, node, *_ in lines] == [
        (site, "joined", "online") for site in SITES
    ]
    assert {version for _, _, _, _, version, *_ in lines} == {__version__}


def test_invalid_study_is_refused_and_kept(seen: dict[str, Any]) -> None:
    assert "federation.rounds" in seen["refused"] and "expected a whole number" in seen["refused"]
    assert seen["kept"]


def test_an_operator_stops_a_run_and_a_viewer_cannot(seen: dict[str, Any], deployment: Deployment) -> None:
    assert seen["viewer sees"] == "running"
    assert seen["viewer's buttons"] == 0 and seen["viewer's stop"] == 403
    stopped = next(one for one in deployment.submitted() if one["folder"].endswith(seen["second"]))
    assert stopped["status"] == "finished:stopped"
    assert "federation.rounds\t2\t40" in seen["settings"]


def test_the_audit_log_says_who_did_it(seen: dict[str, Any], deployment: Deployment) -> None:
    lines = HashChainedLog(deployment.server.path / "audit.jsonl").lines()
    acts = [(line["kind"], line.get("by")) for line in lines if line["kind"].startswith("study_")]
    assert acts.count(("study_submitted", "olga")) == 2 and ("study_stopped", "olga") in acts
    assert "vera" not in {line.get("by") for line in lines}
    assert "no line was changed or removed" in seen["audit"] and "study stopped" in seen["audit"]


def test_pages_asked_nobody_else_and_had_no_errors(seen: dict[str, Any], deployment: Deployment) -> None:
    address = DashboardConfig.read(deployment.server.path).access.origins[0]
    assert seen["problems"] == [] and seen["hosts"] == [address.removeprefix("https://")]


def test_it_is_served_by_tls_that_sites_trust(seen: dict[str, Any]) -> None:
    assert seen["health"] == "ok\n"


def test_proxy_crashes_alone_and_is_restarted(seen: dict[str, Any], deployment: Deployment) -> None:
    def pids() -> dict[str, int]:
        return {name: deployment.pid(SERVER, name) for name in ("superlink", "worker", "dashboard")}

    before = pids()
    deployment.kill(SERVER, "dashboard")
    wait_for(lambda: pids()["dashboard"] not in (0, before["dashboard"]), "the dashboard is started again")
    assert {**pids(), "dashboard": 0} == {**before, "dashboard": 0}
