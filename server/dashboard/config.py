"""How the dashboard of a server is served: dashboard.yaml in the server's folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from fedsigma.common.config.schema import ConfigError, build, read_yaml, split_address
from fedsigma.server.dashboard.auth.passwords import AccountsError
from fedsigma.server.dashboard.auth.settings import AccessSettings

__all__ = ["DashboardConfig", "check_installed"]

FILE = "dashboard.yaml"


@dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """What dashboard.yaml says; all of it may be left out.

    Fields: listen, HOST:PORT; certificate and key, PEM files for TLS, beside dashboard.yaml unless they are
    whole paths, empty where a proxy in front ends TLS; access, by which names it is reached, and limits.
    """

    section: ClassVar[str] = ""

    listen: str = "127.0.0.1:8050"
    certificate: str = ""
    key: str = ""
    access: AccessSettings = field(
        default_factory=lambda: AccessSettings(origins=("http://127.0.0.1:8050", "http://localhost:8050"))
    )

    def __post_init__(self) -> None:
        split_address(self.listen, where="listen")
        if bool(self.certificate) != bool(self.key):
            raise ConfigError("certificate and key belong together: name both, or none")
        if self.certificate and not self.access.secure:
            raise ConfigError("access.origins has http, and there is a certificate: expected https://...")
        if self.access.secure and not self.certificate and not self.access.proxies:
            raise ConfigError(
                "access.origins has https, and there is neither a certificate nor a proxy: name certificate"
                " and key, or in access.proxies the address of the proxy that ends TLS"
            )

    @classmethod
    def read(cls, folder: Path) -> DashboardConfig:
        """That of a server's folder; what goes without saying where there is no such file.

        Raises:
            ConfigError: it does not read, or holds what does not do.
        """
        file = folder / FILE
        if not file.is_file():
            return cls()
        found = build(cls, read_yaml(file.read_text(encoding="utf-8"), where=str(file)), where=str(file))
        if not found.certificate:
            return found
        certificate, key = (str(folder / Path(name).expanduser()) for name in (found.certificate, found.key))
        return replace(found, certificate=certificate, key=key)


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
    """Find out before anything of the dashboard is imported.

    Raises:
        AccountsError: a package of the extra is not there.
    """
    for name in _MODULES:
        if find_spec(name) is None:
            raise AccountsError(f"{name} is not installed: pip install 'fedsigma[dashboard]'")
