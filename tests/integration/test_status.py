"""One process of a server or a site by itself, as a container or a systemd unit runs it: start and health."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import grpc
import httpx
import pytest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.cli.server import PROCESSES
from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.ops.supervisor import Process
from fedsigma.server.deployment.certificates import create_authority, issue_certificate
from fedsigma.server.deployment.home import ServerHome
from tests.unit.test_diagnostics import enrol, results_by_name

runner = CliRunner()


def run(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(main, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


def free_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def serving() -> Iterator[str]:
    """The address of a gRPC health service that says SERVING."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def site(tmp_path: Path) -> SiteHome:
    return enrol(tmp_path, create_authority("tests").certificate)


def connect(site: SiteHome, **changes: str) -> None:
    file = site.path / "connection.yaml"
    lines = [line for line in file.read_text().splitlines() if line.split(":")[0] not in changes]
    file.write_text("\n".join([*lines, *(f'{key}: "{value}"' for key, value in changes.items())]) + "\n")


def test_the_health_of_one_process_of_a_site_needs_nothing_of_the_others(
    site: SiteHome, serving: str
) -> None:
    connect(site, node_health=serving)
    shutil.rmtree(site.path / "worker")
    (site.path / "site.yaml").unlink()
    code, out, _ = run("site", "status", "--folder", site.path, "--only", "node", "--json")
    assert code == 0 and [(r["process"], r["health"]) for r in json.loads(out)] == [("node", "serving")]
    assert run("site", "status", "--folder", site.path)[0] == 4
    assert run("site", "status", "--folder", site.path, "--only", "worker")[0] == 4


def test_to_ask_for_health_writes_nothing(site: SiteHome) -> None:
    """The worker's programs name the Python that runs it; who only asks may have another."""
    before = sorted(site.path.rglob("*"))
    assert run("site", "status", "--folder", site.path)[0] == 4
    assert sorted(site.path.rglob("*")) == before


@pytest.mark.parametrize("command", ["up", "status", "doctor"])
def test_missing_process_is_named(command: str, site: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it is not refused, nothing must take this process's place.
    monkeypatch.setattr("fedsigma.cli.site.supervise", lambda processes, folder: None)
    code, _, err = run("site", command, "--folder", site.path, "--only", "superlink")
    assert code == 3 and "expected node or worker" in err


def test_diagnostics_of_one_process_check_its_own_view(site: SiteHome) -> None:
    shutil.move(site.path / "worker", site.path.parent / "worker")
    rules = (site.path / "site.yaml").rename(site.path.parent / "site.yaml")
    results = results_by_name(site.path, offline=True, only="node")
    assert {name for name, one in results.items() if not one.ok} == {"node"}
    assert "images" not in results and "certificates" not in results
    assert "certificates" in results_by_name(site.path, only="node")

    shutil.rmtree(site.path / "node")
    shutil.move(site.path.parent / "worker", site.path / "worker")
    rules.rename(site.path / "site.yaml")
    results = results_by_name(site.path, deep=False, only="worker")
    assert {name for name, one in results.items() if not one.ok} == {"worker"} and "site.yaml" in results
    (site.path / "worker" / "identity.pem").chmod(0o640)
    assert not results_by_name(site.path, deep=False, only="worker")["secrets"].ok


def test_the_workers_node_address_can_be_set(site: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an address is known only when the worker starts, as in Kubernetes."""
    started = []
    monkeypatch.setattr(Process, "replace_this", lambda self, folder: started.append(list(self.command)))
    monkeypatch.setattr("fedsigma.cli.site.supervise", lambda processes, folder: None)
    up = ["site", "up", "--folder", site.path]
    monkeypatch.setenv("FEDSIGMA_NODE", "10.0.0.7:9101")
    assert run(*up, "--only", "worker")[0] == 0 and "10.0.0.7:9101" in started[0]
    for more in ([], ["--only", "node"]):
        code, _, err = run(*up, *more)
        assert code == 3 and "--node needs --only worker" in err
    monkeypatch.setenv("FEDSIGMA_NODE", "$(NO_SUCH_SERVICE_HOST):9101")
    code, _, err = run(*up, "--only", "worker")
    assert code == 3 and "expected HOST:PORT" in err and len(started) == 1


def test_a_secret_as_kubernetes_mounts_it_is_in_order(
    site: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root has files of root's")
    monkeypatch.setattr(os, "getuid", lambda: 10001)
    for mode, ok in ((0o440, True), (0o460, False), (0o444, False)):
        (site.path / "node" / "node.key").chmod(mode)
        assert results_by_name(site.path, offline=True, only="node")["secrets"].ok == ok


@pytest.fixture
def server(tmp_path: Path) -> Path:
    made = run("server", "init", tmp_path / "server", "--address", "fl.example.org:443")
    assert made[0] == 0, made
    return tmp_path / "server"


def test_a_server_for_containers_is_made_by_one_command(tmp_path: Path) -> None:
    where = ["--superlink", "superlink:8000", "--health", "superlink:8001", "--worker-health", "worker:8002"]
    command = ["server", "init", tmp_path / "new", "--address", "fl.example.org:443", "--if-new", *where]
    assert run(*command)[0] == 0
    made = ServerHome(tmp_path / "new")
    config = made.config
    assert (config.health, config.worker_health) == ("superlink:8001", "worker:8002")
    before = made.tls("ca.crt").read_bytes()
    code, out, _ = run(*command)
    assert code == 0 and "holds a server already" in out and made.tls("ca.crt").read_bytes() == before
    assert run(*(word for word in command if word != "--if-new"))[0] == 3
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert run("server", "init", tmp_path / "taken", *command[3:])[0] == 3


def test_only_the_proxy_needs_the_proxys_folder(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(Process, "replace_this", lambda self, folder: started.append(self.name))
    shutil.rmtree(server / "proxy")
    for name in ("superlink", "worker", "auto-resume"):
        assert run("server", "up", "--folder", server, "--only", name)[0] == 0
    (server / "proxy").mkdir()
    assert run("server", "up", "--folder", server, "--only", "proxy")[0] == 0
    assert (
        started == ["superlink", "worker", "auto-resume", "proxy"]
        and (server / "proxy" / "nginx.conf").is_file()
    )
    code, _, err = run("server", "up", "--folder", server, "--only", "node")
    assert code == 3 and "expected one of superlink, worker, auto-resume, proxy" in err


def test_the_health_of_one_process_of_a_server(server: Path, serving: str) -> None:
    file = server / "server.yaml"
    file.write_text(file.read_text().replace("127.0.0.1:8001", serving).replace("127.0.0.1:8002", serving))
    for name in ("superlink", "worker"):
        code, out, _ = run("server", "status", "--folder", server, "--only", name, "--json")
        assert code == 0 and [(r["process"], r["health"]) for r in json.loads(out)] == [(name, "serving")]
    assert run("server", "status", "--folder", server)[0] == 4
    assert run("server", "status", "--folder", server, "--only", "node")[0] == 3


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def shown(server: Path, origin: str, **said: str) -> None:
    """Write dashboard.yaml."""
    lines = [f"{key}: {value}" for key, value in said.items()]
    text = "\n".join([*lines, f"access: {{origins: ['{origin}'], proxies: [127.0.0.1]}}"])
    (server / "dashboard.yaml").write_text(text + "\n")


@contextmanager
def up(server: Path, process: str) -> Iterator[Path]:
    """One process of a server while it serves; gives its log."""
    program, log = Path(sys.executable).with_name("fedsigma"), server.parent / f"{process}.log"
    command = [str(program), "server", "up", "--folder", str(server), "--only", process]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as running:
        try:
            deadline = time.monotonic() + 60
            while run("server", "status", "--folder", server, "--only", process)[0] != 0:
                assert running.poll() is None and time.monotonic() < deadline, "it did not serve in a minute"
                time.sleep(0.1)
            yield log
        finally:
            running.terminate()


def health(server: Path) -> tuple[int, str]:
    """The exit code of the dashboard's status, and what it says."""
    code, out, _ = run("server", "status", "--folder", server, "--only", "dashboard", "--json")
    (row,) = json.loads(out)
    assert row["process"] == "dashboard"
    return code, row["health"]


def test_the_dashboards_health_is_its_page_by_its_own_certificate(server: Path) -> None:
    pytest.importorskip("uvicorn", reason="the dashboard is an extra")
    listen = free_address().replace("127.0.0.1", "0.0.0.0")
    made = ServerHome(server)
    # Nobody asks by the name of this certificate, and who signed it does not matter.
    issue_certificate(made.authority(), ["dash.example.org"]).write(server / "dash.crt", server / "dash.key")
    shown(server, "https://dash.example.org", listen=listen, certificate="dash.crt", key="dash.key")
    assert health(server) == (4, "no answer (connection refused)")
    with up(server, "dashboard"):
        assert health(server) == (0, "serving")
        whole = run("server", "status", "--folder", server, "--json")
        assert whole[0] == 4 and {row["process"] for row in json.loads(whole[1])} == set(PROCESSES)
        # One of the same authority's for the same name is not its.
        issue_certificate(made.authority(), ["dash.example.org"]).write(
            server / "dash.crt", server / "new.key"
        )
        code, words = health(server)
        assert code == 4 and words.startswith("no answer (") and "certificate" in words
    assert health(server)[0] == 4


class Answers(BaseHTTPRequestHandler):
    """Answers each path with a status of its own."""

    statuses: ClassVar = {"/health": 503}

    def do_GET(self) -> None:
        self.send_response(self.statuses.get(self.path, 200))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_silent_health_endpoint_is_unhealthy(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        # Whatever way out the environment names, one's own processes are asked directly.
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        shown(server, "http://127.0.0.1:8050", listen=f"127.0.0.1:{web.server_port}")
        assert health(server) == (4, "answers 503")
        monkeypatch.setitem(Answers.statuses, "/health", 200)
        assert health(server) == (0, "serving")
        # It answers, but not by TLS, as its file has it by now.
        pair = issue_certificate(ServerHome(server).authority(), ["dash.example.org"])
        pair.write(server / "dash.crt", server / "dash.key")
        own = {"certificate": "dash.crt", "key": "dash.key"}
        shown(server, "https://dash.example.org", listen=f"127.0.0.1:{web.server_port}", **own)
        code, words = health(server)
        assert code == 4 and words.startswith("no answer (")
        web.shutdown()


def test_an_unreachable_dashboard_does_not_hide_the_other_processes(server: Path, serving: str) -> None:
    file = server / "server.yaml"
    file.write_text(file.read_text().replace("127.0.0.1:8001", serving))
    for text, words in (
        ("listen: nowhere\n", "expected HOST:PORT"),
        ("certificate: a.crt\nkey: a.key\naccess: {origins: ['https://a.example']}\n", "a.crt"),
        ("certificate: server.yaml\nkey: a.key\naccess: {origins: ['https://a.example']}\n", "PEM"),
    ):
        (server / "dashboard.yaml").write_text(text)
        code, out, _ = run("server", "status", "--folder", server, "--json")
        said = {row["process"]: row["health"] for row in json.loads(out)}
        assert code == 4 and said["superlink"] == "serving"
        assert said["dashboard"].startswith("unknown (") and words in said["dashboard"]


@pytest.mark.parametrize("command", ["up", "status"])
def test_without_its_file_there_is_no_dashboard(command: str, server: Path) -> None:
    code, _, err = run("server", command, "--folder", server, "--only", "dashboard")
    assert code == 3 and str(server / "dashboard.yaml") in err.replace("\n", "")


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_the_health_of_the_proxy_is_requested_through_it(proxy: str, tmp_path: Path, serving: str) -> None:
    if shutil.which(proxy) is None:
        pytest.skip(f"{proxy} is not installed")
    folder = tmp_path / "server"
    listen = ["--listen", free_address(), "--proxy", proxy]
    where = ["--address", "fl.example.org:443", "--health", serving]
    assert run("server", "init", folder, *where, *listen)[0] == 0
    status = ["server", "status", "--folder", folder, "--only", "proxy"]
    assert run(*status)[0] == 4
    # A dashboard in the same folder is not to be reached by the way that sites come.
    (folder / "dashboard.yaml").write_text(f"listen: {serving}\n")
    with up(folder, "proxy") as log:
        with httpx.Client(verify=False, headers={"Host": "fl.example.org"}) as client:
            for path in ("v1/control/list-runs", "", "health", "metrics", "login"):
                url, name = f"https://{listen[1]}/{path}", {"sni_hostname": "fl.example.org"}
                assert client.get(url, extensions=name).status_code == 404, path
        if proxy == "nginx":
            # What is refused is written down, and what goes well is not.
            wait_for(lambda: "/login" in log.read_text())
            assert len(log.read_text().splitlines()) == 5
        # Another's certificate does not do.
        create_authority("another").write(folder / "tls" / "sites.crt", tmp_path / "key")
        assert run(*status)[0] == 4
