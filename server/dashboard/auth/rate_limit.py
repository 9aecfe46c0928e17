"""How often somebody may try to sign in."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import time

from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from fedsigma.server.dashboard.auth.settings import AccessSettings

__all__ = ["LoginRateLimiter"]


class LoginRateLimiter:
    """Counts attempts in a moving window, by name and by address. They are forgotten with the process.

    Args:
        settings: how many there may be.
    """

    def __init__(self, settings: AccessSettings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_name = RateLimitItemPerSecond(settings.per_name, settings.window, "name")
        self._per_address = RateLimitItemPerSecond(settings.per_address, settings.window, "address")

    def wait(self, address: str, name: str | None = None) -> int:
        """Count an attempt.

        Args:
            address: of the client.
            name: of the user, where one is told.

        Returns:
            0 if it may be made, else the seconds until one may.
        """
        counted = [(self._per_address, _network(address))]
        if name is not None:
            counted.append((self._per_name, _key(name)))
        for limit, key in counted:
            if not self._limiter.hit(limit, key):
                free = self._limiter.get_window_stats(limit, key).reset_time
                return max(1, math.ceil(free - time.time()))
        return 0

    def forget(self, name: str) -> None:
        """Begin anew for a user who signed in."""
        self._limiter.clear(self._per_name, _key(name))


def _key(name: str) -> str:
    # As long for a name of 60,000 letters as for another.
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def _network(address: str) -> str:
    """The address, or of IPv6 the /64 network, in which one machine may have as many as it likes."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found), 64), strict=False))
    return str(found)
