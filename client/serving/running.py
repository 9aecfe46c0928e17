"""Listening: the socket, TLS, and an orderly end."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import warnings
from collections.abc import Callable
from pathlib import Path

import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from fedsigma.client.serving.settings import Limits, ServeError

__all__ = ["check_tls", "listening", "run", "server"]

GRACE_S = 5


def listening(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ServeError: the address is not this machine's, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}): name a free one with --host and --port"
        ) from None


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse a certificate and key that do not do.

    Raises:
        ServeError: one is missing, they do not belong together, or the key is encrypted.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise ServeError("TLS needs both: name --certificate and --key")
    try:
        # An empty password, since OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ServeError(
            f"{certificate} and {key} cannot be used ({error.reason or 'no PEM'}): expected a certificate"
            " chain and its key without a password, both PEM"
        ) from None


def server(
    app: ASGIApp, limits: Limits, *, certificate: Path | None = None, key: Path | None = None
) -> uvicorn.Server:
    """A server that logs no request and stops in order, giving those under way their time."""
    config = uvicorn.Config(
        app,
        # h11 bounds the size of a request's head; nothing here is chosen by what happens to be installed.
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.timeout_s) + GRACE_S,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return uvicorn.Server(config)


def _quieten() -> None:
    """Have libraries that decode say nothing: their warnings quote what is in a file, such as a name."""
    warnings.simplefilter("ignore")
    for name in ("pydicom", "PIL"):
        logging.getLogger(name).disabled = True


def run(made: uvicorn.Server, place: socket.socket, limits: Limits, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    _quieten()
    # Pillow refuses twice this number by itself, also where pydicom calls it for a picture within a picture.
    Image.MAX_IMAGE_PIXELS = limits.pixels // 2 or 1
    # uvicorn stops in order, then raises the signal again for whoever waited for it: here nobody does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    announce()
    made.run(sockets=[place])
