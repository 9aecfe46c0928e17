"""Serve a web application: socket, TLS and orderly shutdown. Needs uvicorn, from the extras."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["WebError", "check_tls", "create_server", "open_listener", "serve_until_stopped"]


class WebError(FedSigmaError, ValueError):
    """An address cannot be listened on, or a certificate is invalid."""


def open_listener(host: str, port: int, *, remedy: str = "name a free one") -> socket.socket:
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
    """Check a certificate and its key; both None for no TLS.

    Raises:
        WebError: One is missing, they do not belong together, or the key is encrypted.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise WebError("TLS needs both a certificate and a key: pass both")
    try:
        # With an empty password, since OpenSSL would otherwise prompt for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise WebError(
            f"{certificate} and {key} cannot be used ({error.reason or 'no PEM'}): expected a certificate"
            " chain and its key without a password, both PEM"
        ) from None


def create_server(
    app: ASGIApp, *, grace_s: int, certificate: Path | None = None, key: Path | None = None
) -> uvicorn.Server:
    """Return a server without request logs, which gives open requests `grace_s` seconds on shutdown."""
    config = uvicorn.Config(
        app,
        # Named, since uvicorn's defaults depend on what is installed; h11 limits a request's head.
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


def serve_until_stopped(
    web_server: uvicorn.Server, listener: socket.socket, announce: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C; calls `announce` before."""
    # uvicorn raises the signal again after its shutdown, which must not end the process with an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    announce()
    web_server.run(sockets=[listener])
