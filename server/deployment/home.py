"""The server's folder, created by `fedsigma server init`.

server.yaml      names, addresses, limits; may be edited
tls/             certificate authority and certificates; keep ca.key offline where possible
secrets/         the secret that Flower's processes share
proxy/           nginx.conf and Caddyfile, written from server.yaml
state.db         Flower's database
server.db        sites, invitations, keys, studies
dashboard.db     users of the dashboard
studies/ runs/   submitted studies, and run folders
audit.jsonl      which sites took part, and what was accepted or rejected
logs/            logs of the processes
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.fields import Address, Line, ListOf, one_of
from fedsigma.common.config.schema import (
    build,
    local_address,
    read_yaml,
    settings,
    split_address,
    write_yaml,
)
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_secret, write_whole
from fedsigma.server.deployment.certificates import CertificatePair, create_authority, issue_certificate

__all__ = ["ServerConfig", "ServerHome", "ServerHomeError"]

PROXIES = ("nginx", "caddy", "none")
_FLOWER_CONFIG = """\
[superlink]
default = "server"

[superlink.server]
address = "{address}"
root-certificates = "{authority}"
"""


class ServerHomeError(FedSigmaError, ValueError):
    """The server's folder is missing, in use or damaged, or a command is invalid in its state."""


@settings
class ServerConfig:
    """Names, addresses and limits of a server: server.yaml."""

    section: ClassVar[str] = ""

    name: Annotated[Line, Field(description="Name of the server, as certificates and invitations have it.")]
    address: Annotated[Address, Field(description="HOST:PORT by which sites reach the proxy.")]
    listen: Annotated[Address, Field(description="HOST:PORT where the proxy listens.")] = "0.0.0.0:443"
    superlink: Annotated[
        Address, Field(description="HOST:PORT where Flower's SuperLink listens; no site may reach it.")
    ] = "127.0.0.1:8000"
    health: Annotated[Address, Field(description="HOST:PORT of the SuperLink's gRPC health service.")] = (
        "127.0.0.1:8001"
    )
    worker_health: Annotated[
        Address, Field(description="HOST:PORT of the health service of the process that runs studies.")
    ] = "127.0.0.1:8002"
    proxy: Annotated[
        str,
        one_of(PROXIES),
        Field(description="Proxy that fedsigma server up starts; none: it is run by other means."),
    ] = "nginx"
    names: Annotated[
        ListOf[str],
        Field(min_length=1, description="Host names and addresses in the SuperLink's certificate."),
    ] = ("localhost", "127.0.0.1", "superlink")
    largest_message: Annotated[int, Field(ge=1, le=1024, description="Largest message in MiB.")] = 16


class ServerHome:
    """The server's folder, opened.

    Args:
        path: The folder.

    Attributes:
        path: Absolute path of the folder.
        config: Settings of server.yaml.

    Raises:
        ServerHomeError: The folder has no server.yaml.
        ConfigError: server.yaml is invalid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        file = self.path / "server.yaml"
        if not file.is_file():
            raise ServerHomeError(
                f"{self.path} holds no server.yaml: create a server with `fedsigma server init`"
            )
        self.config = build(
            ServerConfig, read_yaml(file.read_text(encoding="utf-8"), where=str(file)), where=str(file)
        )

    @classmethod
    def create(
        cls, path: Path, config: ServerConfig, *, own: CertificatePair | None, trust: bytes = b""
    ) -> ServerHome:
        """Create a server.

        Args:
            path: A new or empty folder.
            config: Settings to write to server.yaml.
            own: Certificate for `address`; None to issue one here.
            trust: With `own`, PEM certificates that sites trust.

        Raises:
            ServerHomeError: The folder is not empty.
        """
        path = path.expanduser().resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ServerHomeError(f"{path} is not an empty folder: name a new one; nothing was changed")
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        for name in ("tls", "secrets", "proxy", "studies", "runs", "logs", "flwr"):
            (path / name).mkdir(mode=0o700)
        (path / "server.yaml").write_text(write_yaml(config), encoding="utf-8")
        home = cls(path)
        write_secret(home.secret, secrets.token_bytes(32))
        authority = create_authority(f"{config.name} FedSigma authority")
        authority.write(home.tls("ca.crt"), home.tls("ca.key"))
        home.issue_inner()
        home.install_outer(own)
        home.tls("sites.crt").write_bytes(trust or authority.certificate)
        home.write_flower_config()
        return home

    def tls(self, name: str) -> Path:
        """Return the path of a file in tls/."""
        return self.path / "tls" / name

    @property
    def secret(self) -> Path:
        """Path of the secret that Flower's processes of this server share."""
        return self.path / "secrets" / "superexec.secret"

    def authority(self) -> CertificatePair:
        """Return the certificate authority of this server.

        Raises:
            ServerHomeError: Its key is not in the folder.
        """
        try:
            return CertificatePair(self.tls("ca.crt").read_bytes(), self.tls("ca.key").read_bytes())
        except FileNotFoundError as error:
            raise ServerHomeError(
                f"{error.filename} is missing: put the authority's key back while this command runs"
            ) from None

    def issue_inner(self) -> None:
        """Issue a new certificate for the SuperLink, which the proxy and the server's own commands verify."""
        host, _ = split_address(self.config.superlink, where="superlink")
        names = dict.fromkeys([*self.config.names, *([host] if host not in ("0.0.0.0", "::") else [])])
        issue_certificate(self.authority(), list(names)).write(self.tls("inner.crt"), self.tls("inner.key"))

    def install_outer(self, own: CertificatePair | None = None) -> None:
        """Install a certificate for the address that sites connect to; None to issue a new one."""
        host, _ = split_address(self.config.address, where="address")
        pair = own or issue_certificate(self.authority(), [host])
        pair.write(self.tls("outer.crt"), self.tls("outer.key"))

    @property
    def control(self) -> str:
        """HOST:PORT by which this machine connects to the SuperLink."""
        return local_address(self.config.superlink, where="superlink")

    def write_flower_config(self) -> None:
        """Write the configuration by which the `flwr` command connects to the SuperLink."""
        file = self.path / "flwr" / "config.toml"
        text = _FLOWER_CONFIG.format(address=self.control, authority=self.tls("ca.crt"))
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_whole(file, text.encode())
