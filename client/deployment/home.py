"""A site's folder, created by `fedsigma site enrol`.

    site.yaml        the site's policy; written once, then edited by the site
    connection.yaml  the server, and the addresses of the site's own processes
    node/            of the process that connects to the server: node.key, sites.crt, the shared secret
    worker/          of the process that reads images: identity.pem, the shared secret, approved and pending
                     bundles, audit log, ledger, personal values
    logs/            of both

The two parts share the secret only, so that two users or two containers can own them: the process with the
server's connection has no images, and the process with the images has no connection to the outside.
"""

from __future__ import annotations

import datetime
import secrets
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

__all__ = ["Connection", "SiteHome"]

FOLDERS = (".", "node", "node/flwr", "worker", "worker/flwr", "worker/approved", "worker/pending", "logs")
SITE_YAML = """\
# The policy of this site. Nothing that the server sends can widen it; docs/federation.md explains each key.
name: {name}

# Where the images are: folder:PATH, csv:PATH, parquet:PATH or dicom:PATH. Try it: fedsigma data check
source: folder:/data

# Names of the studies that may run here.
studies: []

# Backbones that studies may use, and where each is stored on this machine.
backbones:
  starter: starter

# App bundles that may run here. `fedsigma site approve` shows the changes of a new one, and adds it.
bundles: []

# Limits of one round and of one study.
max_local_steps: 1000
max_examples: 10000
max_rounds: 1000
max_evaluations: 10000

# Fewest sites that are averaged together, and what is shared besides the average.
min_cohort: 2
share_class_counts: false
share_confusion: false
allow_attribution: false
allow_explanation: false

# Processors for training (null: all), and GPUs: auto, none, or numbers such as "0,1".
cpus: null
gpus: auto

# Secure aggregation: this site's key, and the other sites' public keys from the study's list.
identity: worker/identity.pem
peers: {{}}
require_masking: false

# Differential privacy: what training must hide at least, and the budget of all studies together.
privacy: none
epsilon: null

audit: worker/audit.jsonl
ledger: worker/privacy.jsonl
personal: worker/personal
"""


@settings
class Connection:
    """connection.yaml: a site's server, and the addresses of its own processes."""

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


class SiteHome:
    """The folder of a site.

    Args:
        path: The folder.

    Raises:
        EnrolmentFileError: There is no connection.yaml.
        ConfigError: connection.yaml is invalid.
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
        """Create a site's folder and keys from an invitation; an existing site.yaml is kept.

        Raises:
            EnrolmentFileError: The invitation is invalid, or the folder belongs to a site already.
        """
        invitation.check(now=_now())
        path = path.expanduser().resolve()
        if (path / "connection.yaml").exists():
            raise EnrolmentFileError(
                f"{path} belongs to a site already: renew its keys with `fedsigma site rotate`"
            )
        for name in FOLDERS:
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
        keys = _new_keys(path, "node.key", site=invitation.site, word=invitation.word)
        # Last, so that an incomplete folder can be enrolled again.
        (path / "connection.yaml").write_text(write_yaml(connection), encoding="utf-8")
        return cls(path), keys

    def rotate_key(self) -> SiteKeys:
        """Create a new node key; `switch_key` replaces the old one once the server has admitted it."""
        return _new_keys(self.path, "next.key", site=self.connection.site, word=None)

    def switch_key(self) -> None:
        """Replace the node key by the new one; the old one is kept as old.key.

        Raises:
            EnrolmentFileError: There is no new key.
        """
        node = self.path / "node"
        if not (node / "next.key").exists():
            raise EnrolmentFileError(f"{node} holds no next.key: create it with `fedsigma site rotate`")
        for old, new in (("node", "old"), ("next", "node")):
            for suffix in ("key", "pub"):
                (node / f"{old}.{suffix}").replace(node / f"{new}.{suffix}")

    @staticmethod
    def read_trust(file: Path) -> tuple[str, list[str]]:
        """Read certificates that the server sent.

        Returns:
            Their PEM text, and for each its subject and end of validity.

        Raises:
            EnrolmentFileError: The file has no certificate, or none that is valid now.
        """
        try:
            pem = file.read_text(encoding="ascii")
            certificates = x509.load_pem_x509_certificates(pem.encode())
        except (OSError, ValueError) as error:
            raise EnrolmentFileError(f"{file} holds no certificates: {error}") from None
        if not any(c.not_valid_before_utc <= _now() < c.not_valid_after_utc for c in certificates):
            raise EnrolmentFileError(
                f"{file} holds no certificate that is valid now: ask the server for a new file"
            )
        return pem, [
            f"{c.subject.rfc4514_string()}, until {c.not_valid_after_utc:%Y-%m-%d}" for c in certificates
        ]

    def trust(self, pem: str) -> None:
        """Trust only these certificates; the earlier ones are kept as sites.old.crt."""
        file = self.path / "node" / "sites.crt"
        write_whole(file.with_name("sites.old.crt"), file.read_bytes())
        write_whole(file, pem.encode("ascii"))

    def read_policy(self) -> SitePolicy:
        """Read site.yaml.

        Raises:
            ConfigError: site.yaml is invalid, or belongs to another site.
        """
        policy = SitePolicy.read(self.path / "site.yaml")
        if policy.name != self.connection.site:
            raise ConfigError(
                f"{self.path / 'site.yaml'}: name is '{policy.name}', and the server knows this site as"
                f" '{self.connection.site}'"
            )
        return policy


def _new_keys(path: Path, name: str, *, site: str, word: str | None) -> SiteKeys:
    """Create a node key (ECDSA P-384, as Flower requires) and sign it with the site's identity."""
    key = ec.generate_private_key(ec.SECP384R1())
    file = path / "node" / name
    write_secret(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    file.with_suffix(".pub").write_bytes(public + b"\n")
    identity = read_identity(path / "worker" / "identity.pem")
    signed_at = _now().isoformat()
    return SiteKeys.sign(site=site, node_key=public.decode(), identity=identity, made=signed_at, word=word)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
