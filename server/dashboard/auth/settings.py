"""Section `access` of dashboard.yaml: URLs and limits of a dashboard."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from fedsigma.common.config.fields import Check, ListOf
from fedsigma.common.config.schema import ConfigError, settings
from fedsigma.server.dashboard.auth.urls import check_url

__all__ = ["AccessSettings"]

_ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")


def _check_origin(origin: str) -> None:
    check_url(origin)
    default_port = ":443" if origin.startswith("https:") else ":80"
    if not _ORIGIN.fullmatch(origin) or origin.endswith(default_port):
        raise ValueError(
            f"expected it as browsers send it: in small letters, without a path and without '{default_port}'"
        )


def _check_network(proxy: str) -> None:
    try:
        ipaddress.ip_network(proxy)
    except ValueError:
        # `*` among them: then a client could claim any address.
        raise ValueError("expected an address or network, such as 10.0.0.0/8") from None


@settings
class AccessSettings:
    """By which URLs a dashboard is reached, and its limits."""

    section: ClassVar[str] = "access"

    origins: Annotated[
        ListOf[Annotated[str, Check(_check_origin, {"pattern": "^https?://"})]],
        Field(
            min_length=1,
            description="URLs by which browsers reach it, such as https://fl.example.org; http only for this"
            " machine. Other hosts are refused. An OpenID provider redirects to the first.",
        ),
    ]
    proxies: Annotated[
        ListOf[Annotated[str, Check(_check_network, {})]],
        Field(description="Addresses or networks of proxies whose X-Forwarded-For is trusted."),
    ] = ()
    per_name: Annotated[int, Field(ge=1, description="Login attempts for a name in a window.")] = 10
    per_address: Annotated[int, Field(ge=1, description="Login attempts from an address in a window.")] = 30
    window: Annotated[int, Field(ge=1, description="Length of the window in seconds.")] = 300
    body: Annotated[int, Field(ge=1, description="Largest body of a request in bytes.")] = 65536
    patience: Annotated[float, Field(ge=1, description="Timeout of a request in seconds.")] = 30.0

    def __post_init__(self) -> None:
        if len({origin.partition(":")[0] for origin in self.origins}) > 1:
            raise ConfigError("access.origins has both http and https, expected one of them")

    @property
    def secure(self) -> bool:
        """Whether browsers connect by TLS."""
        return self.origins[0].startswith("https:")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Allowed values of a request's `Host` header."""
        return tuple(origin.partition("://")[2] for origin in self.origins)

    @property
    def cookie(self) -> str:
        """Name of the session cookie.

        Only this host can set a cookie that begins with `__Host-`. Without TLS the prefix is not allowed; the
        name then has the port, since all ports of a machine share their cookies.
        """
        return "__Host-fedsigma" if self.secure else f"fedsigma-{urlsplit(self.origins[0]).port or 80}"
