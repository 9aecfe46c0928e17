"""A site's folder: what a hospital keeps to take part, made by `fedsigma site enrol`.

    site.yaml        the site's own rules; written once, then the site's to edit
    connection.yaml  which server, and where the site's own processes find each other
    node/            of the process that talks to the server: node.key, sites.crt, the shared secret
    worker/          of the process that sees images: identity.pem, the shared secret, approved and pending
                     bundles, audit log, ledger, personal values
    logs/            of both

The two parts share nothing but the secret, so that two users or two containers can own them: the one that
holds the key to the outside sees no image, and the one that sees images has no way out.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedsigma.client.site.identity import new_identity, read_identity
from fedsigma.client.site.policy import SitePolicy
from fedsigma.common.config.fields import Address, OptionalAddress
from fedsigma.common.config.schema import ConfigError, build, read_yaml, settings, write_yaml
from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation, SiteKeys
from fedsigma.common.utils.files import write_secret, write_whole

__all__ = ["Connection", "SiteHome", "TrustedCertificates"]

SITE_YAML = """\
# The rules of this site. Nothing that the server sends can widen them; docs/federation.md explains each.
name: {name}

# Where the images are: folder:PATH, csv:PATH, parquet:PATH or dicom:PATH. Try it: fedsigma data check
source: folder:/data

# Which studies may run here, by name.
studies: []

# Which backbones they may use, and where each lies on this machine.
backbones:
  starter: starter

# Which app bundles may run here. `fedsigma site approve` shows what a new one brings, and adds it.
bundles: []

# The most that one round, and one study, may ask.
max_local_steps: 1000
max_examples: 10000
max_rounds: 1000
max_evaluations: 10000

# The fewest sites that must be averaged together, and what may be told beside the average.
min_cohort: 2
share_class_counts: false
share_confusion: false
allow_attribution: false
allow_explanation: false

# Processors for training (null: all), and which GPUs: auto, none, or numbers such as "0,1".
cpus: null
gpus: auto

# Masked sums: this site's key, and the other sites' public keys from the study's list.
identity: worker/identity.pem
peers: {{}}
require_masking: false

# Differential privacy: the least that training must hide, and the budget of all studies together.
privacy: none
epsilon: null

audit: worker/audit.jsonl
ledger: worker/privacy.jsonl
personal: worker/personal
"""


@settings
class Connection:
    """Which server a site belongs to, and where its own processes find each other: connection.yaml."""

    section: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {"centre": "server_name", "server": "address"}

    site: str
    """Name of the site, from the invitation."""
    server_name: str
    """Name of the server, from the invitation."""
    address: Address
    """HOST:PORT of the server, from the invitation."""
    node: Address = "127.0.0.1:9101"
    """HOST:PORT where the node serves the worker; it must not be reachable from outside."""
    listen: OptionalAddress = ""
    """HOST:PORT where the node listens for the worker; empty: node."""
    node_health: OptionalAddress = "127.0.0.1:9102"
    """HOST:PORT of the node's gRPC health service; empty: none."""
    worker_health: OptionalAddress = "127.0.0.1:9103"
    """HOST:PORT of the worker's gRPC health service; empty: none."""


@dataclass(frozen=True)
class TrustedCertificates:
    """Certificates of authorities: their PEM text, and for people whose they are and until when."""

    pem: str
    subjects: tuple[str, ...]


class SiteHome:
    """A site's folder, opened.

    Raises:
        JoinError: there is no connection.yaml.
        ConfigError: it does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        file = self.path / "connection.yaml"
        if not file.is_file():
            raise EnrolmentFileError(
                f"{self.path} holds no connection.yaml: join a server with `fedsigma site enrol`"
            )
        values = read_yaml(file.read_text(encoding="utf-8"), where=str(file))
        self.connection = build(Connection, values, where=str(file))

    @classmethod
    def enrol(cls, path: Path, invitation: Invitation) -> tuple[SiteHome, SiteKeys]:
        """Make a site's folder and keys from an invitation.

        A folder that has a site.yaml already keeps it: a hospital may write its rules first.

        Raises:
            JoinError: the invitation is not valid, or the folder belongs to a site already.
        """
        invitation.check(now=_now())
        path = path.expanduser().resolve()
        if (path / "connection.yaml").exists():
            raise EnrolmentFileError(
                f"{path} belongs to a site already: renew its keys with `fedsigma site rotate`"
            )
        for name in (
            "",
            "node",
            "node/flwr",
            "worker",
            "worker/flwr",
            "worker/approved",
            "worker/pending",
            "logs",
        ):
            (path / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = secrets.token_bytes(32)
        for part in ("node", "worker"):
            write_secret(path / part / "superexec.secret", secret)
        (path / "node" / "sites.crt").write_text(invitation.certificates, encoding="ascii")
        if not (path / "worker" / "identity.pem").exists():
            new_identity(path / "worker" / "identity.pem")
        if not (path / "site.yaml").exists():
            (path / "site.yaml").write_text(SITE_YAML.format(name=invitation.site), encoding="utf-8")
        connection = Connection(
            site=invitation.site, server_name=invitation.server_name, address=invitation.address
        )
        node_key = _new_node_key(path / "node")
        keys = SiteKeys.sign(
            site=invitation.site,
            node_key=node_key,
            identity=read_identity(path / "worker" / "identity.pem"),
            made=_now().isoformat(),
            word=invitation.word,
        )
        # Last, so that a folder without it can be enrolled again.
        (path / "connection.yaml").write_text(write_yaml(connection), encoding="utf-8")
        return cls(path), keys

    def rotate_key(self) -> SiteKeys:
        """Make a new node key beside the one in use; `switch` takes it into use once the server knows it."""
        node_key = _new_node_key(self.path / "node", name="next.key")
        identity = read_identity(self.path / "worker" / "identity.pem")
        site = self.connection.site
        return SiteKeys.sign(
            site=site, node_key=node_key, identity=identity, made=_now().isoformat(), word=None
        )

    def switch_key(self) -> None:
        """Take the new node key into use; the old one stays as old.key until the next time.

        Raises:
            JoinError: there is none.
        """
        node = self.path / "node"
        if not (node / "next.key").exists():
            raise EnrolmentFileError(f"{node} holds no next.key: make one with `fedsigma site rotate`")
        for old, new in (("node", "old"), ("next", "node")):
            for suffix in ("key", "pub"):
                (node / f"{old}.{suffix}").replace(node / f"{new}.{suffix}")

    @staticmethod
    def read_trust(file: Path) -> TrustedCertificates:
        """Read the certificates that the server sent.

        Raises:
            JoinError: there is none, or none that is valid now.
        """
        try:
            text = file.read_text(encoding="ascii")
            found = x509.load_pem_x509_certificates(text.encode())
        except (OSError, ValueError) as error:
            raise EnrolmentFileError(f"{file} holds no certificates: {error}") from None
        if not any(one.not_valid_before_utc <= _now() < one.not_valid_after_utc for one in found):
            raise EnrolmentFileError(
                f"{file} holds no certificate that is valid now: ask the server for a new file"
            )
        ends = [f"{one.subject.rfc4514_string()}, until {one.not_valid_after_utc:%Y-%m-%d}" for one in found]
        return TrustedCertificates(text, tuple(ends))

    def trust(self, certificates: TrustedCertificates) -> None:
        """Trust these certificates and no others; what was trusted before stays as sites.old.crt."""
        file = self.path / "node" / "sites.crt"
        write_whole(file.with_name("sites.old.crt"), file.read_bytes())
        write_whole(file, certificates.pem.encode("ascii"))

    def read_policy(self) -> SitePolicy:
        """The site's rules.

        Raises:
            ConfigError: site.yaml does not read, or is another site's.
        """
        found = SitePolicy.read(self.path / "site.yaml")
        if found.name != self.connection.site:
            raise ConfigError(
                f"{self.path / 'site.yaml'}: name is '{found.name}', and the server knows this site as"
                f" '{self.connection.site}'"
            )
        return found


def _new_node_key(folder: Path, *, name: str = "node.key") -> str:
    """Make an ECDSA P-384 key, the kind that Flower takes; returns the public key in OpenSSH's form."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(folder / name, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / name).with_suffix(".pub").write_bytes(public + b"\n")
    return public.decode()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
