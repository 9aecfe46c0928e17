"""A study across real processes: the same shift as the simulation, and nothing open that should not be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.runs.run_dir import RunDir
from tests.deployment.network import SERVER
from tests.deployment.parts import SITES, STUDY, Deployment, missing, reached, wait_for
from tests.helpers.fake_grid import run_in_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "it is"),
]
TRAIN = "TrainTask"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def finished(deployment: Deployment, study: Path) -> RunDir:
    """A whole study, during which every process of the server is killed once."""
    _, folder = deployment.submit(study)
    wait_for(lambda: reached(folder, 1), "the first round begins")
    for process in ("superlink", "proxy"):
        deployment.kill(SERVER, process)
    wait_for(lambda: reached(folder, 2), "the second round begins")
    # A site that begins before its node has the whole message waits for what a dead run never sends,
    # and loses the next run's first round to that.
    run = str(folder.events()[0]["run"])
    wait_for(lambda: all(deployment.received(site, run, 2) for site in SITES), "the sites have the message")
    deployment.kill(SERVER, "worker")
    ended = wait_for(lambda: completed(deployment, folder), "the study ends", 400)
    assert ended == "finished:completed"
    return folder


def completed(deployment: Deployment, folder: RunDir) -> str:
    """How a run ended; one that died is not over, since it is gone on with."""
    # The folder is asked first: to ask the SuperLink takes seconds of a processor.
    return deployment.ended(folder) if folder.events()[-1]["kind"] == "run_end" else ""


def test_it_ends_with_the_shift_of_the_simulation(
    finished: RunDir,
    deployment: Deployment,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    # The same bases: singular vectors are those of the machine that computed them.
    monkeypatch.setenv("FEDSIGMA_CACHE", deployment.environment["FEDSIGMA_CACHE"])
    run_in_process(study, tmp_path / "simulated", sites=len(SITES))
    real, simulated = (
        load_file(folder / "sigma.safetensors")["shift"] for folder in (finished.path, tmp_path / "simulated")
    )
    assert np.abs(real).max() > 0.01
    np.testing.assert_allclose(real, simulated, atol=5e-5)


def test_crashed_run_was_resumed(finished: RunDir) -> None:
    kinds = [e["kind"] for e in finished.events() if e["kind"] in ("run_start", "run_end")]
    assert kinds == ["run_start", "run_start", "run_end"]
    lost = [r for r in finished.rounds() if r["status"] not in ("accepted", ALL_SITES)]
    assert lost == []


def test_sent_replies_equal_received_ones(finished: RunDir, deployment: Deployment) -> None:
    runs = {e["run"] for e in finished.events() if e["kind"] == "run_start"}
    came = [
        one
        for one in HashChainedLog(deployment.server.path / "audit.jsonl").lines()
        if one.get("run") in runs
    ]
    for name, site in deployment.sites.items():
        lines = HashChainedLog(site.path / "worker" / "audit.jsonl").lines()
        lines = [line for line in lines if line["request"]["run"] in runs]
        assert {line["request"]["round"] for line in lines if line["request"]["message"] == TRAIN} == {1, 2}
        left = {(line["reply"]["bytes"], line["reply"]["sha256"]) for line in lines}
        told = {
            (line["bytes"], line["sha256"]) for line in came if line.get("site") == name and "sha256" in line
        }
        # What was on its way when the server's process died left twice and counted once.
        assert told and told <= left


def test_the_same_study_twice_is_refused(finished: RunDir, deployment: Deployment, study: Path) -> None:
    again = deployment.run(SERVER, "study", "submit", study, "-f", deployment.server.path, check=False)
    assert again.returncode == 3 and "was submitted before as run" in again.stderr


def test_site_is_healthy(finished: RunDir, deployment: Deployment) -> None:
    folder = deployment.sites["east"].path
    told = deployment.run("east", "site", "doctor", "--quick", "-f", folder, check=False).stdout
    bad = [line for line in told.splitlines() if line.startswith("FAIL")]
    # From the node's place, in a network of its own, the worker's health cannot be asked.
    assert [line.split()[1] for line in bad] == (["worker"] if deployment.network.apart else [])
    for check in ("path", "clock", "server", "key", "node"):
        assert f"ok   {check} " in told


def test_from_outside_nothing_can_be_started(finished: RunDir, deployment: Deployment) -> None:
    """Every path but Fleet's is closed, and Fleet's wants a node's signature."""
    trust = deployment.sites["east"].path / "node" / "sites.crt"
    script = Path(__file__).with_name("outside.py")
    found = deployment.python("east", script, deployment.server.config.address, trust)
    closed = [line for line in found if line.startswith("closed")]
    signed = [line for line in found if line.startswith("signed")]
    assert len(closed) == 16 and {line.split()[-1] for line in closed} == {"404"}, closed
    assert len(signed) == 4 and {line.split()[-1] for line in signed} == {"401"}, signed


def test_process_with_images_has_no_network(deployment: Deployment) -> None:
    network, config = deployment.network, deployment.server.config
    if not network.apart:
        pytest.skip("no right to make network namespaces here: all processes share one host")
    for site in SITES:
        assert network.reaches(site, config.address)
        assert not network.reaches(site, config.superlink)
        assert network.reaches(f"{site}-worker", deployment.sites[site].connection.node)
        for address in (config.address, config.superlink, f"10.77.{1 + SITES.index(site)}.1:{22}"):
            assert not network.reaches(f"{site}-worker", address)
    assert not network.reaches("east", deployment.sites["north"].connection.node)


def test_secrets_stay_where_they_were_made(finished: RunDir, deployment: Deployment) -> None:
    everything = b"".join(
        path.read_bytes()
        for path in deployment.server.path.rglob("*")
        if path.is_file() and not path.is_socket()
    )
    for site in deployment.sites.values():
        for name in ("node/node.key", "worker/identity.pem", "worker/superexec.secret"):
            secret = (site.path / name).read_bytes()
            assert secret not in everything
    assert os.environ.get("FEDSIGMA_SITE") is None
