"""The server's folder: one place for what its server needs, made by `fedsigma server init`.

server.yaml      names, addresses, limits; may be edited
tls/             authority and certificates; ca.key is the one file to keep off-line where that is possible
secrets/         what Flower's processes know each other by
proxy/           nginx.conf and Caddyfile, made from server.yaml
state.db         Flower's database
server.db        sites, invitations, keys, studies
dashboard.db     who may see the dashboard
studies/ runs/   what was submitted, and what came of it
audit.jsonl      who took part, what was accepted or refused
logs/            of the processes
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.fields import Address, Line, ListOf, one_of
from fedsigma.common.config.schema import (
    build,
    read_yaml,
    resolve_relative,
    settings,
    split_address,
    write_yaml,
)
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_secret, write_whole
from fedsigma.server.deployment.certificates import CertificatePair, create_authority, issue_certificate

__all__ = ["ServerConfig", "ServerHome", "ServerHomeError"]

PROXIES = ("nginx", "caddy", "none")


class ServerHomeError(FedSigmaError, ValueError):
    """The server's folder is missing, taken or damaged, or a command does not fit its state."""


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

    Raises:
        ServerError: there is no server.yaml.
        ConfigError: server.yaml does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        file = self.path / "server.yaml"
        if not file.is_file():
            raise ServerHomeError(
                f"{self.path} holds no server.yaml: make a server with `fedsigma server init`"
            )
        self.config = build(
            ServerConfig, read_yaml(file.read_text(encoding="utf-8"), where=str(file)), where=str(file)
        )

    @classmethod
    def create(
        cls, path: Path, config: ServerConfig, *, own: CertificatePair | None, trust: bytes = b""
    ) -> ServerHome:
        """Make a new server.

        Args:
            path: a new or empty folder.
            config: for server.yaml.
            own: the certificate for `address` if it is not to be made here.
            trust: PEM certificates that sites trust, where `own` is given.

        Raises:
            ServerError: the folder is not empty.
        """
        path = path.expanduser().resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ServerHomeError(f"{path} is not an empty folder: name a new one; nothing was changed")
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        for name in ("tls", "secrets", "proxy", "studies", "runs", "logs", "flwr"):
            (path / name).mkdir(mode=0o700)
        write_secret(path / "secrets" / "superexec.secret", secrets.token_bytes(32))
        (path / "server.yaml").write_text(write_yaml(config), encoding="utf-8")
        folder = cls(path)
        authority = create_authority(f"{config.name} FedSigma authority")
        authority.write(folder.tls("ca.crt"), folder.tls("ca.key"))
        folder.issue_inner()
        if own is None:
            folder.issue_outer()
        else:
            own.write(folder.tls("outer.crt"), folder.tls("outer.key"))
        folder.tls("sites.crt").write_bytes(trust or authority.certificate)
        folder.write_flower_config()
        return folder

    def tls(self, name: str) -> Path:
        """The path of a file among the certificates."""
        return self.path / "tls" / name

    @property
    def secret(self) -> Path:
        """The file of the secret that Flower's processes here share."""
        return self.path / "secrets" / "superexec.secret"

    def authority(self) -> CertificatePair:
        """The authority of this server.

        Raises:
            ServerError: its key is not here.
        """
        try:
            return CertificatePair(self.tls("ca.crt").read_bytes(), self.tls("ca.key").read_bytes())
        except FileNotFoundError as error:
            raise ServerHomeError(
                f"{error.filename} is not there: put the authority's key back for the time of this command"
            ) from None

    def issue_inner(self) -> None:
        """Make a new certificate for the SuperLink, which the proxy and the server's own commands verify."""
        host, _ = split_address(self.config.superlink, where="superlink")
        names = dict.fromkeys([*self.config.names, *([host] if host not in ("0.0.0.0", "::") else [])])
        issue_certificate(self.authority(), list(names)).write(self.tls("inner.crt"), self.tls("inner.key"))

    def issue_outer(self) -> None:
        """Make a new certificate for the address that sites reach."""
        host, _ = split_address(self.config.address, where="address")
        issue_certificate(self.authority(), [host]).write(self.tls("outer.crt"), self.tls("outer.key"))

    @property
    def control(self) -> str:
        """HOST:PORT at which this machine reaches the SuperLink."""
        return resolve_relative(self.config.superlink, where="superlink")

    def write_flower_config(self) -> None:
        """Write how the `flwr` command reaches the SuperLink, into a Flower home of this server's own."""
        lines = ["[superlink]", 'default = "server"', "", "[superlink.server]"]
        lines += [f'address = "{self.control}"', f'root-certificates = "{self.tls("ca.crt")}"']
        file, text = self.path / "flwr" / "config.toml", "\n".join(lines) + "\n"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_whole(file, text.encode())
