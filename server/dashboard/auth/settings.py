"""How a dashboard is reached, and what it puts up with."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from fedsigma.common.config.schema import ConfigError, check_number

__all__ = ["HERE", "AccessSettings", "check_url"]

HERE = ("127.0.0.1", "localhost", "::1")
"""Hosts that are this machine itself."""
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Who is let near the dashboard.

    Fields: origins, by which browsers reach it, such as https://fl.example.org (http may only be this
    machine's own); other hosts are refused, and the first is where an OpenID provider sends people back to.
    proxies, addresses or networks whose X-Forwarded-For is believed. per_name and per_address, attempts to
    sign in within `window` seconds. body, the most bytes of a request. patience, the most seconds for it.
    """

    section: ClassVar[str] = "access"

    origins: tuple[str, ...]
    proxies: tuple[str, ...] = ()
    per_name: int = 10
    per_address: int = 30
    window: int = 300
    body: int = 65536
    patience: float = 30.0

    def __post_init__(self) -> None:
        if not self.origins:
            raise ConfigError("access.origins is empty, expected such as https://fl.example.org")
        for origin in self.origins:
            check_url("access.origins", origin)
            usual = ":443" if origin.startswith("https:") else ":80"
            if not _ORIGIN.fullmatch(origin) or origin.endswith(usual):
                raise ConfigError(
                    f"access.origins has '{origin}', expected it as browsers write it: in small letters,"
                    f" without a path and without '{usual}'"
                )
        if len({origin.partition(":")[0] for origin in self.origins}) > 1:
            raise ConfigError("access.origins has both http and https, expected one of them")
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                # `*` among them: then anybody could give any address.
                raise ConfigError(
                    f"access.proxies has '{proxy[:80]}', expected an address or network, such as 10.0.0.0/8"
                ) from None
        for key in ("per_name", "per_address", "window", "body", "patience"):
            check_number(f"access.{key}", getattr(self, key), low=1)

    @property
    def secure(self) -> bool:
        """Whether browsers come by TLS."""
        return self.origins[0].startswith("https:")

    @property
    def hosts(self) -> tuple[str, ...]:
        """What requests may have as their `Host`."""
        return tuple(origin.partition("://")[2] for origin in self.origins)

    @property
    def cookie(self) -> str:
        """The name of the session's cookie.

        A browser lets nobody but this very host set one that begins with `__Host-`. Without TLS there is no
        such name; then it holds the port, since cookies are shared by all ports of a machine.
        """
        return "__Host-fedsigma" if self.secure else f"fedsigma-{urlsplit(self.origins[0]).port or 80}"


def check_url(where: str, url: str) -> None:
    """Refuse an address without TLS, unless it is this machine's own.

    Raises:
        ConfigError: it is neither https://... nor http:// and this machine.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in HERE)
        good = good and bool(parts.hostname) and not parts.username and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"{where} has '{url[:200]}', expected https://..., or http://127.0.0.1:PORT on one's own machine"
        )
