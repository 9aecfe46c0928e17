"""A study across real processes: the same shift as the simulation, and nothing open that should not be."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from deployment.parts import STUDY, Deployment, deployed, missing, wait_for
from fedsigma.client.hospital.doctor import examine
from fedsigma.common.chain import Chain
from fedsigma.common.processes import restart
from fedsigma.server.centre.folder import CentreError
from fedsigma.server.simulate import run_simulation
from fedsigma.server.store import RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "it is"),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment")) as found:
        yield found


@pytest.fixture(scope="module")
def finished(deployment: Deployment, study: Path) -> RunFolder:
    """A whole study, during whose first round the SuperLink and the proxy are restarted."""
    made = deployment.studies.submit(str(study))
    folder = Path(made.folder)
    wait_for(
        lambda: (
            (folder / "events.jsonl").exists()
            and any(e["kind"] == "round_start" for e in RunFolder.open(folder).events())
        ),
        "the first round begins",
        240,
    )
    for process in ("superlink", "proxy"):
        restart(deployment.centre.path, process)
    last = list(deployment.studies.watch(made.run_id))[-1]
    assert last.status == "finished:completed", last.status
    return RunFolder.open(folder)


def test_it_ends_with_the_shift_of_the_simulation(
    finished: RunFolder,
    deployment: Deployment,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    # The same bases: singular vectors are those of the machine that computed them.
    monkeypatch.setenv("FEDSIGMA_CACHE", deployment.environment["FEDSIGMA_CACHE"])
    assert run_simulation(str(study), out=tmp_path / "simulated") == 0
    real, simulated = (
        load_file(folder / "sigma.safetensors")["shift"] for folder in (finished.path, tmp_path / "simulated")
    )
    assert np.abs(real).max() > 0.01
    np.testing.assert_allclose(real, simulated, atol=1e-5)


def test_each_site_wrote_down_what_left(finished: RunFolder, deployment: Deployment) -> None:
    told = {(r["round"], r["site"]): r["bytes_up"] for r in finished.rounds() if r["status"] == "accepted"}
    for name, site in deployment.sites.items():
        lines = Chain(site.path / "worker" / "audit.jsonl").lines()
        trained = [line for line in lines if line["asked"]["message"] == "TrainTask"]
        assert [line["asked"]["round"] for line in trained] == [1, 2]
        for line in trained:
            assert line["left"]["bytes"] <= told[line["asked"]["round"], name] < line["left"]["bytes"] + 600


def test_the_same_study_twice_is_refused(finished: RunFolder, deployment: Deployment, study: Path) -> None:
    with pytest.raises(CentreError, match="was submitted before as run"):
        deployment.studies.submit(str(study))


def test_a_site_is_well(finished: RunFolder, deployment: Deployment) -> None:
    found = list(examine(deployment.sites["east"].path, deep=False))
    assert [one for one in found if not one.ok] == []
    assert {"path", "clock", "centre", "key", "node", "worker"} <= {one.check for one in found}


def test_from_outside_nothing_can_be_started(finished: RunFolder, deployment: Deployment) -> None:
    """Every path but Fleet's is closed, and Fleet's wants a node's signature."""
    trust = deployment.sites["east"].path / "node" / "sites.crt"
    base = f"https://{deployment.centre.config.address}"
    context = ssl.create_default_context(cafile=str(trust))
    protobuf = {"content-type": "application/protobuf"}
    with httpx.Client(verify=context, base_url=base, timeout=30) as outside:
        for path in (
            "/v1/control/list-runs",
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "/health",
            "/docs",
            "/openapi.json",
        ):
            for method in ("GET", "POST"):
                answer = outside.request(method, path, headers=protobuf, content=b"")
                assert answer.status_code == 404, (method, path, answer.status_code)
        for call in ("pull-messages", "push-messages", "activate-node", "get-fab"):
            answer = outside.post(f"/v1/fleet/{call}", headers=protobuf, content=b"")
            assert answer.status_code == 401, (call, answer.status_code)


def test_secrets_stay_where_they_were_made(finished: RunFolder, deployment: Deployment) -> None:
    everything = b"".join(
        path.read_bytes()
        for path in deployment.centre.path.rglob("*")
        if path.is_file() and not path.is_socket()
    )
    for site in deployment.sites.values():
        for name in ("node/node.key", "worker/identity.pem", "worker/superexec.secret"):
            secret = (site.path / name).read_bytes()
            assert secret not in everything
    assert os.environ.get("FEDSIGMA_SITE") is None
