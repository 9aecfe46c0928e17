"""The checks of a site before a study. Those of Flower's own processes are in tests/deployment."""

from __future__ import annotations

import datetime
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.deployment.diagnostics import run_checks
from fedsigma.client.deployment.findings import CheckResult
from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.ops.enrolment_files import Invitation
from fedsigma.server.deployment.certificates import CertificatePair, create_authority, issue_certificate

OWN = {"node", "worker"}


class Server(http.server.BaseHTTPRequestHandler):
    """A TLS server in the server's place, with settings instead of a SuperLink."""

    ahead = datetime.timedelta(0)
    answers: dict[str, int] = {}  # noqa: RUF012 - set anew by each test

    def _answer(self) -> None:
        self.send_response_only(self.answers.get(self.path, 404))
        self.send_header(
            "Date", format_datetime(datetime.datetime.now(datetime.UTC) + self.ahead, usegmt=True)
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def authority() -> CertificatePair:
    return create_authority("tests")


@pytest.fixture
def server(authority: CertificatePair, tmp_path: Path) -> Iterator[tuple[str, type[Server]]]:
    issue_certificate(authority, ["127.0.0.1"]).write(tmp_path / "server.crt", tmp_path / "server.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    handler = type("Handler", (Server,), {"answers": {"/v1/fleet/pull-messages": 415}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def enrol(folder: Path, certificates: bytes, server: str = "127.0.0.1:9") -> SiteHome:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    invitation = Invitation(
        site="east",
        server_name="Server",
        address=server,
        certificates=certificates.decode(),
        word="ab" * 32,
        expires=end.isoformat(),
    )
    site, _ = SiteHome.enrol(folder / "east", invitation)
    # Ports where nothing listens.
    file = site.path / "connection.yaml"
    file.write_text(file.read_text().replace("127.0.0.1:910", "127.0.0.1:1"))
    return SiteHome(site.path)


def results_by_name(path: Path, **options: Any) -> dict[str, CheckResult]:
    return {one.check: one for one in run_checks(path, **options)}


def test_a_new_folder_is_in_order(authority: CertificatePair, tmp_path: Path) -> None:
    site = enrol(tmp_path, authority.certificate)
    results = results_by_name(site.path, offline=True, deep=False)
    assert {name for name, one in results.items() if not one.ok} == OWN
    assert "no answer" in results["node"].detail and "logs/node.log" in results["node"].remedy


def test_problems_of_the_folder_are_named(authority: CertificatePair, tmp_path: Path) -> None:
    assert not results_by_name(tmp_path)["folder"].ok
    site = enrol(tmp_path, authority.certificate)
    (site.path / "node" / "node.key").chmod(0o644)
    (site.path / "site.yaml").write_text("name: east\nsorce: x\n")
    results = results_by_name(site.path, offline=True)
    assert "chmod 600" in results["secrets"].remedy
    assert "did you mean 'source'" in results["site.yaml"].detail
    (site.path / "node" / "node.key").chmod(0o600)
    (site.path / "worker" / "superexec.secret").write_bytes(b"other")
    assert "different secrets" in results_by_name(site.path, offline=True)["secrets"].detail
    (site.path / "worker" / "identity.pem").unlink()
    assert "identity.pem is missing" in results_by_name(site.path, offline=True)["secrets"].detail


def test_route_to_the_server(
    server: tuple[str, type[Server]], authority: CertificatePair, tmp_path: Path
) -> None:
    address, handler = server
    site = enrol(tmp_path, authority.certificate, address)
    results = results_by_name(site.path, deep=False)
    assert results["connection"].ok and results["path"].ok and results["clock"].ok
    # This server speaks no gRPC.
    assert not results["server"].ok and "fedsigma server status" in results["server"].remedy

    handler.answers = {"/v1/fleet/pull-messages": 415, "/v1/control/list-runs": 200}
    assert "can start code here" in results_by_name(site.path, deep=False)["path"].detail
    handler.answers = {}
    assert "the Fleet path answers 404" in results_by_name(site.path, deep=False)["path"].detail
    for status, words in (
        (401, "rejects this node's signature"),
        (412, "does not admit this node's key"),
        (500, "500"),
    ):
        handler.answers = {"/v1/fleet/activate-node": status}
        assert words in results_by_name(site.path, deep=False)["key"].detail
    handler.answers = {"/v1/fleet/activate-node": 400}
    assert results_by_name(site.path, deep=False)["key"].ok


@pytest.mark.parametrize(
    ("ahead", "words"),
    [(-10, "s ahead of the server's"), (400, "s behind the server's"), (-1, ""), (100, "")],
)
def test_a_clock_that_flower_would_refuse(
    ahead: int, words: str, server: tuple[str, type[Server]], authority: CertificatePair, tmp_path: Path
) -> None:
    address, handler = server
    handler.ahead = datetime.timedelta(seconds=ahead)
    results = results_by_name(enrol(tmp_path, authority.certificate, address).path, deep=False)["clock"]
    assert results.ok == (not words) and words in results.detail


def test_untrusted_or_unreachable_server(
    server: tuple[str, type[Server]], authority: CertificatePair, tmp_path: Path
) -> None:
    site = enrol(tmp_path, create_authority("another").certificate, server[0])
    results = results_by_name(site.path, deep=False)
    assert "is not one that this site trusts" in results["connection"].detail
    # What would only say the same again is left out.
    assert "clock" not in results and "node" in results
    (tmp_path / "b").mkdir()
    results = results_by_name(enrol(tmp_path / "b", authority.certificate).path, deep=False)
    assert "cannot be reached" in results["connection"].detail and "firewall" in results["connection"].remedy


def test_certificates_that_end_soon(tmp_path: Path) -> None:
    for days, words in ((20, "expires on"), (0, "expired on")):
        (tmp_path / str(days)).mkdir()
        site = enrol(tmp_path / str(days), create_authority("old", days=days).certificate)
        results = results_by_name(site.path, deep=False)["certificates"]
        assert not results.ok and words in results.detail


def test_a_dry_round_on_the_sites_own_images(
    authority: CertificatePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    site = enrol(tmp_path, authority.certificate)
    file = site.path / "site.yaml"
    rules = file.read_text()
    file.write_text(rules.replace("folder:/data", "demo\noptions: {laboratories: [east], train: 1, test: 1}"))
    results = results_by_name(site.path, offline=True)
    assert results["images"].ok and results["backbone starter"].ok
    assert results["dry round"].ok and "a step on 3 images" in results["dry round"].detail
    file.write_text(rules.replace("  starter: starter", "  other: local-dir:/nowhere"))
    result = CliRunner().invoke(main, ["site", "doctor", "-f", str(site.path), "--offline", "--json"])
    assert result.exit_code == 4
    printed = {one["check"]: one for one in json.loads(result.stdout)}
    assert "cannot be loaded" in printed["backbone other"]["detail"]
    assert "cannot be opened" in printed["images"]["detail"] and not printed["dry round"]["ok"]
