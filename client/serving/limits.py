"""What a service is held to: its limits, who may reach it, and the token."""

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
    """A service that cannot or must not be started as asked."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all together, may ask for.

    Fields: body_bytes of a request; images a request, frames counted singly; pixels of an image; requests
    under way at once, and per_client of one address; waiting, images in the queue; batch, images judged
    together at most; wait_s, seconds that a batch waits for those that are being decoded; timeout_s, seconds
    from a request's head to its answer.

    Raises:
        ServeError: one is not positive, or the queue does not take the images of one request.
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
        """Seconds that requests under way get when the service is told to stop."""
        return int(self.timeout_s) + GRACE_S

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name == "wait_s" else 1e-9
            if not (math.isfinite(value) and value >= least):
                raise ServeError(f"the limit {one.name} is {value}, expected a positive number")
        if self.queue_size < self.images:
            raise ServeError(
                f"the queue holds {self.queue_size} images and a request may have {self.images}: expected a"
                " queue_size of at least as many"
            )


def read_token(path: Path) -> str:
    """The bearer token in a file: one line of at least 16 visible ASCII characters.

    Raises:
        ServeError: it is too short, or something else.
    """
    token = path.read_bytes().strip()
    if len(token) < MIN_TOKEN_LENGTH or not all(33 <= byte <= 126 for byte in token):
        raise ServeError(
            f"{path} holds no token: expected one line of at least {MIN_TOKEN_LENGTH} visible ASCII"
            " characters, such as the output of `openssl rand -hex 32`"
        )
    return token.decode("ascii")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, *, token: bool, open_to_all: bool) -> None:
    """Refuse to let a service be reached by others without a token, unless that is meant.

    Raises:
        ServeError: it would be.
    """
    if not (token or open_to_all or is_loopback(host)):
        raise ServeError(
            f"{host} can be reached from other machines, and no token is asked for: name one with"
            " --token-file, or say --open if everyone who reaches it may use it"
        )
