"""Rate limit of login attempts."""

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
    """Counts login attempts per user name and per address in a moving window, in memory.

    Args:
        settings: The limits.
    """

    def __init__(self, settings: AccessSettings) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_name = RateLimitItemPerSecond(settings.per_name, settings.window, "name")
        self._per_address = RateLimitItemPerSecond(settings.per_address, settings.window, "address")

    def register_attempt(self, address: str, name: str | None = None) -> int:
        """Count an attempt.

        Args:
            address: IP address of the client.
            name: Name of the user, if one was given.

        Returns:
            0 if the attempt is allowed, else the seconds to wait.
        """
        limits = [(self._per_address, _network(address))]
        if name is not None:
            limits.append((self._per_name, _hash(name)))
        for limit, key in limits:
            if not self._limiter.hit(limit, key):
                reset_at = self._limiter.get_window_stats(limit, key).reset_time
                return max(1, math.ceil(reset_at - time.time()))
        return 0

    def reset(self, name: str) -> None:
        """Reset the count of a user who signed in."""
        self._limiter.clear(self._per_name, _hash(name))


def _hash(name: str) -> str:
    # Keys have a constant length, however long the name is.
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def _network(address: str) -> str:
    """Return the address, or for IPv6 its /64 network, which one machine may use as a whole."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)
