"""Replacing certificates and authorities, judged by real TLS handshakes."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsigma.cli import site as site_cli
from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.deployment.certificate_rotation import (
    create_next_authority,
    renew_certificates,
    switch_authority,
)
from fedsigma.server.deployment.certificates import (
    AuthorityError,
    CertificatePair,
    create_authority,
    issue_certificate,
)
from fedsigma.server.deployment.home import ServerConfig, ServerHome, ServerHomeError

HOST = "fl.example.org"


def make(path: Path, own: CertificatePair | None = None, trust: bytes = b"") -> ServerHome:
    config = ServerConfig(name="Server", address=f"{HOST}:443")
    return ServerHome.create(path, config, own=own, trust=trust)


def enrol(server: ServerHome, path: Path) -> SiteHome:
    invitation = Invitation(
        site="north",
        server_name="Server",
        address=f"{HOST}:443",
        certificates=server.tls("sites.crt").read_text(),
        word="ab" * 32,
        expires="2999-01-01T00:00:00+00:00",
    )
    return SiteHome.enrol(path, invitation)[0]


def accepts(site: SiteHome, server: ServerHome) -> bool:
    """Return whether a site accepts the server's certificate in a TLS handshake."""
    client = ssl.create_default_context(cafile=str(site.path / "node" / "sites.crt"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.tls("outer.crt"), server.tls("outer.key"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=HOST),
        context.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_a_new_certificate_needs_nothing_of_sites(tmp_path: Path) -> None:
    server = make(tmp_path / "server")
    site, before = enrol(server, tmp_path / "north"), server.tls("outer.crt").read_bytes()
    renew_certificates(server)
    assert server.tls("outer.crt").read_bytes() != before
    assert accepts(site, server)


def test_an_authority_is_replaced_with_an_overlap(tmp_path: Path) -> None:
    server = make(tmp_path / "server")
    updated, forgot = enrol(server, tmp_path / "updated"), enrol(server, tmp_path / "forgot")
    with pytest.raises(ServerHomeError, match="no next authority"):
        switch_authority(server)
    create_next_authority(server, tmp_path / "trust.pem")
    joined_meanwhile = enrol(server, tmp_path / "meanwhile")
    done = CliRunner().invoke(
        site_cli.app, ["trust", str(tmp_path / "trust.pem"), "--yes", "-f", str(updated.path)]
    )
    assert done.exit_code == 0 and "until" in done.output
    assert all(accepts(site, server) for site in (updated, forgot, joined_meanwhile))
    switch_authority(server)
    assert accepts(updated, server) and accepts(joined_meanwhile, server) and not accepts(forgot, server)
    assert accepts(enrol(server, tmp_path / "later"), server)
    noted = [line["kind"] for line in HashChainedLog(server.path / "audit.jsonl").lines()]
    assert noted == ["authority_begun", "authority_switched"]


def test_a_groups_own_certificate_is_not_replaced_by_one_that_sites_do_not_trust(tmp_path: Path) -> None:
    group = create_authority("Hospital group")
    server = make(tmp_path / "server", issue_certificate(group, [HOST]), group.certificate)
    site = enrol(server, tmp_path / "north")
    with pytest.raises(ServerHomeError, match="--certificate and --key"):
        renew_certificates(server)
    with pytest.raises(ServerHomeError, match="replace it there"):
        create_next_authority(server, tmp_path / "trust.pem")
    other, new = issue_certificate(group, [HOST]), issue_certificate(group, [HOST])
    with pytest.raises(AuthorityError, match="does not belong"):
        renew_certificates(server, CertificatePair(new.certificate, other.key))
    with pytest.raises(AuthorityError, match="expired on"):
        renew_certificates(server, issue_certificate(group, [HOST], days=0))
    assert accepts(site, server)
    renew_certificates(server, new)
    assert server.tls("outer.crt").read_bytes() == new.certificate and accepts(site, server)


def test_a_site_trusts_no_file_without_a_valid_certificate(tmp_path: Path) -> None:
    site = enrol(make(tmp_path / "server"), tmp_path / "north")
    before = (site.path / "node" / "sites.crt").read_bytes()
    for text, words in (("nothing", "holds no certificates"), ("", "holds no certificates")):
        (tmp_path / "x.pem").write_text(text)
        with pytest.raises(EnrolmentFileError, match=words):
            site.read_trust(tmp_path / "x.pem")
    (tmp_path / "x.pem").write_bytes(create_authority("old", days=0).certificate)
    with pytest.raises(EnrolmentFileError, match="valid now"):
        site.read_trust(tmp_path / "x.pem")
    assert (site.path / "node" / "sites.crt").read_bytes() == before
