"""Limits of the service, the check of its network exposure, and its token."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, fields
from pathlib import Path

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["Limits", "ServeError", "check_exposure", "is_loopback", "read_token"]

MIN_TOKEN_LENGTH = 16
GRACE_S = 5


class ServeError(FedSigmaError, ValueError):
    """The service cannot be started with these settings."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of all requests together.

    Attributes:
        body_bytes: Most bytes of a request's body.
        images: Most images of a request; each frame counts as one.
        pixels: Most pixels of an image or frame.
        requests: Most concurrent requests.
        per_client: Most concurrent requests of one address.
        queue_size: Most images in the queue.
        batch_size: Most images in one batch.
        wait_s: Seconds that a batch waits for images being decoded.
        timeout_s: Seconds from a request's headers to its response.

    Raises:
        ServeError: A limit is not positive, or the queue is smaller than one request.
    """

    body_bytes: int = 32 * 2**20
    images: int = 64
    pixels: int = 25_000_000
    requests: int = 32
    per_client: int = 16
    queue_size: int = 256
    batch_size: int = 32
    wait_s: float = 0.005
    timeout_s: float = 60.0

    @property
    def grace_s(self) -> int:
        """Seconds that active requests have to complete after a stop signal."""
        return int(self.timeout_s) + GRACE_S

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, minimum = getattr(self, limit.name), 0 if limit.name == "wait_s" else 1e-9
            if not (math.isfinite(value) and value >= minimum):
                raise ServeError(f"the limit {limit.name} is {value}, expected a positive number")
        if self.queue_size < self.images:
            raise ServeError(
                f"the queue holds {self.queue_size} images and a request may have {self.images}: expected a"
                " queue_size of at least as many"
            )


def read_token(path: Path) -> str:
    """Read a bearer token from a file: one line of at least 16 visible ASCII characters.

    Raises:
        ServeError: The token is too short, or has other characters.
    """
    token = path.read_bytes().strip()
    if len(token) < MIN_TOKEN_LENGTH or not all(33 <= byte <= 126 for byte in token):
        raise ServeError(
            f"{path} holds no token: expected one line of at least {MIN_TOKEN_LENGTH} visible ASCII"
            " characters, such as the output of `openssl rand -hex 32`"
        )
    return token.decode("ascii")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, *, token: bool, open_to_all: bool) -> None:
    """Reject an address that other machines can reach, unless a token or `--open` is given.

    Raises:
        ServeError: The service would be open to other machines.
    """
    if not (token or open_to_all or is_loopback(host)):
        raise ServeError(
            f"{host} can be reached from other machines and no token is required: set --token-file, or"
            " --open to allow access to everyone"
        )
