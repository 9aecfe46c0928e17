"""Assembles the dashboard's app and serves it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from fedsigma.common.config.schema import split_address
from fedsigma.common.ops.web import check_tls, create_server, open_listener, serve_until_stopped
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.login import OneTimeLink
from fedsigma.server.dashboard.auth.middleware import require_login
from fedsigma.server.dashboard.auth.oidc import OidcProvider, OidcSettings
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.config import DashboardConfig
from fedsigma.server.dashboard.pages.coordinator import coordinator_routes
from fedsigma.server.dashboard.pages.routes import DashboardContext, make_app
from fedsigma.server.dashboard.pages.run_index import RunIndex
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.home import ServerHome

__all__ = ["runs_app", "serve", "server_app"]

PAGES = (("/", "Runs"), ("/compare", "Compare"), ("/models", "Models"))
SERVER_PAGES = (*PAGES, ("/sites", "Sites"), ("/audit", "Audit log"))
SHUTDOWN_GRACE_S = 5
LOCAL_SESSION_S = 7 * 86400.0
"""Lifetime of the session that the one-time link opens; another needs a restart of the command."""


def runs_app(runs: Path, *, settings: AccessSettings, link: OneTimeLink) -> ASGIApp:
    """Return the dashboard of a folder of simulations, for one user on this machine."""
    context = DashboardContext(RunIndex(runs), PAGES)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        _warm_up(context)
        yield

    accounts = Accounts(None, max_age=LOCAL_SESSION_S, idle_timeout=LOCAL_SESSION_S)
    return require_login(
        make_app(context, [], lifespan=lifespan), accounts=accounts, settings=settings, link=link
    )


def server_app(server: ServerHome, config: DashboardConfig) -> ASGIApp:
    """Return the dashboard of a server, for its users.

    Raises:
        ConfigError: oidc.yaml is invalid.
    """
    oidc = server.path / "oidc.yaml"
    watch = SuperLinkWatch(server)
    context = DashboardContext(RunIndex(server.path / "runs", server=server, watch=watch), SERVER_PAGES)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        watch.start()
        _warm_up(context)
        yield
        watch.stop()

    return require_login(
        make_app(context, coordinator_routes(context, server, watch), lifespan=lifespan),
        accounts=Accounts(server.path / "dashboard.db"),
        settings=config.access,
        oidc=OidcProvider(OidcSettings.read(oidc), origin=config.access.origins[0])
        if oidc.is_file()
        else None,
        log=ServerAuditLog(server.path),
    )


def _warm_up(context: DashboardContext) -> None:
    """Read the list of runs and the newest run in the background; errors are reported by later requests."""

    def read() -> None:
        with suppress(OSError, ValueError, LookupError):
            context.compile_templates()
            started = (entry for entry in context.run_index.list_runs() if entry.started)
            if entry := next(started, None):
                context.run_view(entry)

    threading.Thread(target=read, name="dashboard-warm-up", daemon=True).start()


def serve(
    app: ASGIApp,
    *,
    listen: str,
    announce: Callable[[], None],
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve the app at HOST:PORT until SIGINT or SIGTERM; `announce` is called when the socket is bound.

    Raises:
        WebError: The address is in use, or the certificate or key (PEM files, or None for HTTP) is invalid.
    """
    check_tls(certificate, key)
    host, port = split_address(listen, where="listen")
    with open_listener(host, port) as socket:
        web_server = create_server(app, grace_s=SHUTDOWN_GRACE_S, certificate=certificate, key=key)
        serve_until_stopped(web_server, socket, announce)
