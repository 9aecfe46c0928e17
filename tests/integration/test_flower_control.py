"""Control of a real SuperLink: nodes and runs over HTTP, and the rest by the `flwr` command."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsigma.common.ops.supervisor import free_ports
from fedsigma.server.deployment.flower_control import ControlError, FlowerControl
from fedsigma.server.deployment.home import ServerConfig, ServerHome
from fedsigma.server.deployment.services import server_processes

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def server(tmp_path: Path) -> ServerHome:
    port, health = free_ports(2)
    config = ServerConfig(name="Server", address="fl.example.org:443")
    local = replace(config, superlink=f"127.0.0.1:{port}", health=f"127.0.0.1:{health}")
    return ServerHome.create(tmp_path / "server", local, own=None)


@pytest.fixture
def superlink(server: ServerHome) -> Iterator[FlowerControl]:
    process = server_processes(server)[0]
    with (server.path / "superlink.log").open("wb") as log:
        running = subprocess.Popen(
            process.command, env={**os.environ, **process.environment}, stdout=log, stderr=log
        )
    control = FlowerControl(server)
    try:
        for _ in range(200):
            try:
                control.runs()
                break
            except ControlError:
                assert running.poll() is None, (server.path / "superlink.log").read_text()[-2000:]
                time.sleep(0.5)
        yield control
    finally:
        running.terminate()
        running.wait(timeout=60)


def test_nodes_are_registered_listed_and_excluded(superlink: FlowerControl) -> None:
    assert superlink.runs() == {} and superlink.nodes() == {}
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    openssh = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    node = superlink.register(openssh)
    assert (superlink.nodes()[node].status, superlink.nodes()[node].last_seen) == ("registered", "")
    with pytest.raises(ControlError, match="the SuperLink reports"):
        superlink.register(openssh)
    superlink.unregister(node)
    assert superlink.nodes()[node].status == "unregistered"
    with pytest.raises(ControlError, match="the SuperLink reports"):
        superlink.stop("1")


def test_a_superlink_that_does_not_answer_is_named(server: ServerHome) -> None:
    with pytest.raises(ControlError, match=f"{server.control} does not answer: is `fedsigma server up`"):
        FlowerControl(server).runs()
    with pytest.raises(ControlError, match=f"{server.control} does not answer: is `fedsigma server up`"):
        FlowerControl(server).stop("1")
