"""A server's folder, certificates and sites. What needs a running SuperLink is in tests/deployment."""

from __future__ import annotations

import datetime
import json
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation, SiteKeys
from fedsigma.common.utils.hash_chain import HashChainedLog
from fedsigma.server.deployment import enrolment as module
from fedsigma.server.deployment.certificates import (
    AuthorityError,
    CertificatePair,
    create_authority,
    issue_certificate,
)
from fedsigma.server.deployment.database import REVOKED, ServerDatabase
from fedsigma.server.deployment.enrolment import Enrolment
from fedsigma.server.deployment.flower_control import ControlError, Node
from fedsigma.server.deployment.home import ServerConfig, ServerHome, ServerHomeError
from fedsigma.server.deployment.proxy import proxy_files


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIGMA_SERVER", raising=False)
    monkeypatch.delenv("FEDSIGMA_DATABASE", raising=False)


CONFIG = ServerConfig(name="Server", address="fl.example.org:443")


class FakeControl:
    """In place of a SuperLink: numbers nodes and forgets nothing."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.status: dict[str, str] = {}
        self.down = False

    def register(self, public_key: str) -> str:
        if self.down:
            raise ControlError("the SuperLink does not answer")
        node = str(100 + len(self.known))
        self.known[node], self.status[node] = public_key, "registered"
        return node

    def unregister(self, node_id: str) -> None:
        self.status[node_id] = "unregistered"

    def nodes(self) -> dict[str, Node]:
        return {node: Node(node, status, "") for node, status in self.status.items()}


@pytest.fixture
def server(tmp_path: Path) -> ServerHome:
    return ServerHome.create(tmp_path / "server", CONFIG, own=None)


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def enrolment(server: ServerHome, control: FakeControl) -> Enrolment:
    return Enrolment(server, control)  # type: ignore[arg-type]


def join(enrolment: Enrolment, folder: Path, name: str = "north") -> tuple[SiteHome, SiteKeys]:
    invitation = enrolment.invite(name, folder / f"{name}-{len(list(folder.iterdir()))}.json", days=7)
    return SiteHome.enrol(folder / name, invitation)


def site_of_node(enrolment: Enrolment) -> dict[str, str]:
    return {key.node_id: site.name for site in enrolment.sites() for key in site.keys if key.state != REVOKED}


def test_secrets_of_a_new_server_are_its_owners_alone(server: ServerHome) -> None:
    for file in ("tls/ca.key", "tls/inner.key", "tls/outer.key", "secrets/superexec.secret"):
        assert stat.S_IMODE((server.path / file).stat().st_mode) == 0o600, file
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o700
    with pytest.raises(ServerHomeError, match="not an empty folder"):
        ServerHome.create(server.path, CONFIG, own=None)
    with pytest.raises(ServerHomeError, match=r"holds no server\.yaml"):
        ServerHome(server.path / "tls")


def test_certificates_are_of_the_authority_and_for_the_names(server: ServerHome) -> None:
    ca = x509.load_pem_x509_certificate(server.tls("ca.crt").read_bytes())
    for file, name in (("outer", "fl.example.org"), ("inner", "localhost")):
        found = x509.load_pem_x509_certificate(server.tls(f"{file}.crt").read_bytes())
        found.verify_directly_issued_by(ca)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert name in names.get_values_for_type(x509.DNSName)
        assert found.not_valid_after_utc <= ca.not_valid_after_utc
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.tls(f"{file}.crt"), server.tls(f"{file}.key"))
    assert not ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length


def test_an_authority_signs_nothing_with_a_strange_key_or_after_its_end() -> None:
    one, other = create_authority("one"), create_authority("other")
    with pytest.raises(AuthorityError, match="does not belong"):
        issue_certificate(CertificatePair(one.certificate, other.key), ["localhost"])
    with pytest.raises(AuthorityError, match="expired on"):
        issue_certificate(create_authority("old", days=0), ["localhost"])


@pytest.mark.parametrize(
    ("key", "value"), [("address", "fl.example.org"), ("superlink", "x:99999"), ("proxy", "apache")]
)
def test_invalid_setting_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ServerConfig(**{**CONFIG.__dict__, key: value})


def test_the_proxy_passes_the_fleet_interface_alone(server: ServerHome) -> None:
    for text in proxy_files(server).values():
        assert "/v1/fleet/" in text and "control" not in text and str(server.tls("outer.key")) in text


def test_a_site_joins_by_two_files(enrolment: Enrolment, control: FakeControl, tmp_path: Path) -> None:
    site, keys = join(enrolment, tmp_path)
    added = enrolment.admit(keys)
    assert control.known == {added.node_id: keys.node_key}
    assert [(s.name, s.state, s.identity) for s in enrolment.sites()] == [("north", "joined", keys.identity)]
    assert site_of_node(enrolment) == {added.node_id: "north"}
    for file in ("node/node.key", "worker/identity.pem", "node/superexec.secret"):
        assert stat.S_IMODE((site.path / file).stat().st_mode) == 0o600, file
        content = (site.path / file).read_bytes()
        everything = b"".join(p.read_bytes() for p in tmp_path.glob("server/**/*") if p.is_file())
        assert content not in everything and content.hex().encode() not in everything
    assert site.read_policy().name == "north"
    # The same keys again, or the same invitation for other keys, do not do.
    with pytest.raises(ServerHomeError, match="has joined with this key already"):
        enrolment.admit(keys)


def test_enrolment_needs_a_current_invitation(
    enrolment: Enrolment, control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = join(enrolment, tmp_path)
    invitation = enrolment.invite("north", tmp_path / "second.json", days=7)
    with pytest.raises(EnrolmentFileError, match="last invitation"):
        enrolment.admit(first)
    with pytest.raises(ServerHomeError, match="was not invited"):
        enrolment.admit(SiteKeys(**{**first.__dict__, "site": "south"}))
    _, second = SiteHome.enrol(tmp_path / "again", invitation)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=8)
    with monkeypatch.context() as patch:
        patch.setattr(module, "utc_now", lambda: later)
        with pytest.raises(EnrolmentFileError, match="expired on"):
            enrolment.admit(second)
    assert not control.known
    enrolment.admit(second)


def test_a_superlink_that_is_down_loses_nothing(
    enrolment: Enrolment, control: FakeControl, tmp_path: Path
) -> None:
    _, keys = join(enrolment, tmp_path)
    control.down = True
    with pytest.raises(ControlError):
        enrolment.admit(keys)
    assert [s.state for s in enrolment.sites()] == ["invited"]
    control.down = False
    enrolment.admit(keys)
    assert [s.state for s in enrolment.sites()] == ["joined"]


def test_a_key_is_renewed_with_an_overlap(enrolment: Enrolment, control: FakeControl, tmp_path: Path) -> None:
    site, keys = join(enrolment, tmp_path)
    old = enrolment.admit(keys).node_id
    new = enrolment.admit(site.rotate_key()).node_id
    assert set(site_of_node(enrolment)) == {old, new}
    control.status[old] = "online"
    assert enrolment.retire_old_keys() == []
    before = (site.path / "node" / "node.key").read_bytes()
    site.switch_key()
    assert (site.path / "node" / "old.key").read_bytes() == before
    control.status[new] = "online"
    assert [key.node_id for key in enrolment.retire_old_keys()] == [old]
    assert site_of_node(enrolment) == {new: "north"} and control.status[old] == "unregistered"
    with pytest.raises(EnrolmentFileError, match=r"holds no next\.key"):
        site.switch_key()


def test_a_revoked_site_is_out_and_the_others_are_not(
    enrolment: Enrolment, control: FakeControl, tmp_path: Path
) -> None:
    for name in ("north", "south"):
        enrolment.admit(join(enrolment, tmp_path, name)[1])
    enrolment.revoke("north")
    assert set(site_of_node(enrolment).values()) == {"south"}
    assert list(control.status.values()) == ["unregistered", "registered"]
    assert [s.state for s in enrolment.sites()] == ["revoked", "joined"]
    with pytest.raises(ServerHomeError, match="there is no site 'west'"):
        enrolment.revoke("west")
    kinds = [line["kind"] for line in HashChainedLog(tmp_path / "server" / "audit.jsonl").lines()]
    assert kinds == ["site_invited", "site_admitted", "site_invited", "site_admitted", "site_revoked"]


def test_node_is_mapped_to_its_enrolled_site(
    enrolment: Enrolment, server: ServerHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ServerDatabase.from_environment() is None
    monkeypatch.setenv("FEDSIGMA_SERVER", str(server.path))
    nodes = ServerDatabase.from_environment()
    assert nodes is not None
    node = int(enrolment.admit(join(enrolment, tmp_path)[1]).node_id)
    assert nodes.node_problem(node, "north") == ""
    assert nodes.node_problem(node, "south") == "its node belongs to site 'north'"
    assert nodes.node_problem(7, "north") == "its node belongs to no site of this server"
    enrolment.revoke("north")
    assert "no site of this server" in nodes.node_problem(node, "north")


def test_a_folder_is_one_sites(enrolment: Enrolment, tmp_path: Path) -> None:
    site, _ = join(enrolment, tmp_path)
    other = enrolment.invite("south", tmp_path / "south.json", days=7)
    with pytest.raises(EnrolmentFileError, match="belongs to a site already"):
        SiteHome.enrol(site.path, other)
    (site.path / "site.yaml").write_text((site.path / "site.yaml").read_text().replace("north", "south"))
    with pytest.raises(ConfigError, match="the server knows this site as 'north'"):
        site.read_policy()


def test_an_invitation_has_what_a_site_trusts(
    enrolment: Enrolment, server: ServerHome, tmp_path: Path
) -> None:
    path = tmp_path / "north.join.json"
    enrolment.invite("north", path, days=7, note="Dr. Who")
    found = Invitation.read(path)
    assert found.certificates.encode() == server.tls("ca.crt").read_bytes()
    assert "Dr. Who" not in json.dumps(found.__dict__)
    with pytest.raises(FileExistsError):
        enrolment.invite("north", path, days=7)
