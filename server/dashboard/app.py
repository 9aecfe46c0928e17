"""Putting the dashboard together, and serving it until it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp

from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.web import check_tls, listening, run, server
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.login import OneTimeLink
from fedsigma.server.dashboard.auth.middleware import guarded
from fedsigma.server.dashboard.auth.oidc import OidcSettings, Provider
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.config import DashboardConfig
from fedsigma.server.dashboard.pages.coordinator import coordinator_routes
from fedsigma.server.dashboard.pages.routes import DashboardContext, make_pages
from fedsigma.server.dashboard.pages.run_index import RunIndex
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.home import ServerHome

__all__ = ["runs_app", "serve", "server_app"]

PAGES = (("/", "Runs"), ("/compare", "Compare"), ("/models", "Models"))
SERVER_PAGES = (*PAGES, ("/sites", "Sites"), ("/audit", "Audit log"))
STOP_S = 5
LOCAL_S = 7 * 86400.0
"""How long the browser that had the link stays in; another would need the command to be started again."""


def runs_app(runs: Path, *, settings: AccessSettings, link: OneTimeLink) -> ASGIApp:
    """The dashboard of a folder of simulations, for who has the link.

    Args:
        runs: the folder that holds the run folders, or a run folder.
        settings: how it is reached.
        link: the only way in.
    """
    desk = DashboardContext(RunIndex(runs), PAGES)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        _warm(desk)
        yield

    pages = make_pages(desk, [], lifespan=lifespan)
    return guarded(
        pages, accounts=Accounts(None, longest=LOCAL_S, idle=LOCAL_S), settings=settings, link=link
    )


def server_app(server: ServerHome, config: DashboardConfig) -> ASGIApp:
    """The dashboard of a server, for its users.

    Raises:
        ConfigError: oidc.yaml does not do.
    """
    oidc = server.path / "oidc.yaml"
    watch = SuperLinkWatch(server)
    desk = DashboardContext(RunIndex(server.path / "runs", server=server, watch=watch), SERVER_PAGES)
    routes: list[Route] = coordinator_routes(desk, server, watch)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        watch.start()
        _warm(desk)
        yield
        watch.stop()

    return guarded(
        make_pages(desk, routes, lifespan=lifespan),
        accounts=Accounts(server.path / "dashboard.db"),
        settings=config.access,
        oidc=Provider(OidcSettings.read(oidc), origin=config.access.origins[0]) if oidc.is_file() else None,
        log=ServerAuditLog(server.path),
    )


def _warm(desk: DashboardContext) -> None:
    """Read the list of runs and the newest of them before anybody asks; what fails is told to who does."""

    def look() -> None:
        with suppress(OSError, ValueError, LookupError):
            desk.ready()
            begun = (line for line in desk.library.lines() if line.begun)
            if line := next(begun, None):
                desk.sections(line)

    threading.Thread(target=look, name="first-look", daemon=True).start()


def serve(
    app: ASGIApp,
    *,
    listen: str,
    announce: Callable[[], None],
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Nothing of a request is logged.

    Args:
        app: what to serve.
        listen: HOST:PORT.
        announce: called when the address is its own.
        certificate, key: PEM files for TLS.

    Raises:
        WebError: the address is taken, or the certificate does not do.
    """
    check_tls(certificate, key)
    host, port = split_address(listen, where="listen")
    with listening(host, port) as place:
        run(server(app, grace_s=STOP_S, certificate=certificate, key=key), place, announce)
