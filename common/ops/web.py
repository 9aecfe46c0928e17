"""Serving web requests: the socket, TLS, and an orderly end. Needs uvicorn, which the extras bring."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["WebError", "check_tls", "listening", "run", "server"]


class WebError(FedSigmaError, ValueError):
    """An address cannot be listened on, or a certificate is invalid."""


def listening(host: str, port: int, *, remedy: str = "name a free one") -> socket.socket:
    """Open a listening socket.

    Args:
        host: Address of this machine.
        port: Port; 0 takes a free one.
        remedy: The next step, for the error message.

    Raises:
        WebError: The address is not this machine's, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise WebError(f"cannot listen on {host} port {port} ({error.strerror}): {remedy}") from None


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse a certificate and key that do not do.

    Raises:
        WebError: one is missing, they do not belong together, or the key is encrypted.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise WebError("TLS needs both a certificate and a key: name both")
    try:
        # An empty password, since OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise WebError(
            f"{certificate} and {key} cannot be used ({error.reason or 'no PEM'}): expected a certificate"
            " chain and its key without a password, both PEM"
        ) from None


def server(
    app: ASGIApp, *, grace_s: int, certificate: Path | None = None, key: Path | None = None
) -> uvicorn.Server:
    """A server that logs no request and stops in order, giving those under way `grace_s` seconds."""
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
        timeout_graceful_shutdown=grace_s,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return uvicorn.Server(config)


def run(made: uvicorn.Server, place: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    # uvicorn stops in order, then raises the signal again for whoever waited for it: here nobody does.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    announce()
    made.run(sockets=[place])
