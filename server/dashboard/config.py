"""Settings of a server's dashboard: dashboard.yaml in the server's folder."""

from __future__ import annotations

from dataclasses import field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.fields import Address
from fedsigma.common.config.schema import ConfigError, build, read_yaml, settings
from fedsigma.server.dashboard.auth.passwords import AccountsError
from fedsigma.server.dashboard.auth.settings import AccessSettings

__all__ = ["DashboardConfig", "check_installed"]

FILE = "dashboard.yaml"


@settings
class DashboardConfig:
    """How a server's dashboard is served: dashboard.yaml, in which each key is optional."""

    section: ClassVar[str] = ""

    listen: Annotated[Address, Field(description="HOST:PORT where the dashboard listens.")] = "127.0.0.1:8050"
    certificate: Annotated[
        str,
        Field(description="PEM file of the TLS certificate, beside dashboard.yaml; empty: a proxy ends TLS."),
    ] = ""
    key: Annotated[str, Field(description="PEM file of the certificate's private key.")] = ""
    access: Annotated[AccessSettings, Field(description="URLs of the dashboard, and limits.")] = field(
        default_factory=lambda: AccessSettings(origins=("http://127.0.0.1:8050", "http://localhost:8050"))
    )

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise ConfigError("certificate and key belong together: set both, or neither")
        if self.certificate and not self.access.secure:
            raise ConfigError("access.origins has http, and certificate is set: expected https://...")
        if self.access.secure and not self.certificate and not self.access.proxies:
            raise ConfigError(
                "access.origins has https, and neither certificate nor access.proxies is set: set certificate"
                " and key, or in access.proxies the address of the proxy that ends TLS"
            )

    @classmethod
    def read(cls, folder: Path) -> DashboardConfig:
        """Read the dashboard.yaml of a server's folder; without such a file, return the defaults.

        Raises:
            ConfigError: The file cannot be parsed, or a key or value is invalid.
        """
        file = folder / FILE
        if not file.is_file():
            return cls()
        config = build(cls, read_yaml(file.read_text(encoding="utf-8"), where=str(file)), where=str(file))
        if not config.certificate:
            return config
        certificate, key = (
            str(folder / Path(name).expanduser()) for name in (config.certificate, config.key)
        )
        return replace(config, certificate=certificate, key=key)


_MODULES = (
    "starlette",
    "uvicorn",
    "argon2",
    "limits",
    "authlib",
    "httpx",
    "python_multipart",
    "itsdangerous",
    "prometheus_client",
)


def check_installed() -> None:
    """Check that the packages of the extra `dashboard` are installed, before any of them is imported.

    Raises:
        AccountsError: A package is not installed.
    """
    for name in _MODULES:
        if find_spec(name) is None:
            raise AccountsError(f"{name} is not installed: pip install 'fedsigma[dashboard]'")
