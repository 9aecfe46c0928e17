"""Authentication of all requests to the dashboard, and protection against forged ones.

Layers around the app, from the outside: security headers, client address from a trusted proxy, server errors,
`AuthMiddleware`. Requests to sign in or out are handled by `LoginApp` and never reach the app.
"""

from __future__ import annotations

import secrets
from urllib.parse import quote

import anyio
from starlette.authentication import AuthCredentials, SimpleUser, UnauthenticatedUser, requires
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsigma.server.dashboard.auth.accounts import Accounts, User
from fedsigma.server.dashboard.auth.login import (
    CHALLENGE,
    LOGIN,
    LOGIN_PATHS,
    PUBLIC_PATHS,
    LoginApp,
    OneTimeLink,
)
from fedsigma.server.dashboard.auth.oidc import OidcProvider
from fedsigma.server.dashboard.auth.passwords import OPERATOR, VIEWER
from fedsigma.server.dashboard.auth.security_headers import SecurityHeadersMiddleware
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.auth.urls import is_ambiguous, local_path
from fedsigma.server.deployment.audit_log import ServerAuditLog

__all__ = ["operator_only", "require_login"]

CSRF_FIELD, CSRF_HEADER = "csrf", "X-CSRF-Token"
"""Form field or header in which state-changing requests send `request.state.user.csrf`."""

POLL_HEADER = "X-Poll"
"""Header of requests that a page sends by itself, which do not count as activity of the user."""

HEALTH, METRICS = "/health", "/metrics"
_SAFE_METHODS = ("GET", "HEAD")

operator_only = requires(OPERATOR)
"""Decorator of endpoints for operators only (Starlette's `requires`); others get status 403."""


def require_login(
    app: ASGIApp,
    *,
    accounts: Accounts,
    settings: AccessSettings,
    oidc: OidcProvider | None = None,
    link: OneTimeLink | None = None,
    log: ServerAuditLog | None = None,
) -> ASGIApp:
    """Wrap an app so that it only receives authenticated requests.

    Requests have `request.state.user`, a `User`. It is None at /health, which is public, and at /metrics,
    which only accepts a program's token. Serve the app with uvicorn's own `proxy_headers` disabled.

    Args:
        app: The dashboard, or any ASGI app.
        accounts: The users and tokens.
        settings: Origins and limits.
        oidc: OpenID provider for signing in, if there is one.
        link: One-time link as the only way to sign in, for a dashboard without users.
        log: The server's audit log, if there is one.
    """
    login_app = LoginApp(accounts=accounts, settings=settings, oidc=oidc, link=link, log=log)
    inner: ASGIApp = ServerErrorMiddleware(
        AuthMiddleware(app, login_app=login_app, accounts=accounts, settings=settings)
    )
    if settings.proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        inner = ProxyHeadersMiddleware(inner, trusted_hosts=list(settings.proxies))  # type: ignore[assignment, arg-type]
    return SecurityHeadersMiddleware(inner, secure=settings.secure)


class AuthMiddleware:
    """Rejects invalid requests and passes the others to the app or to `LoginApp`."""

    def __init__(
        self, app: ASGIApp, *, login_app: LoginApp, accounts: Accounts, settings: AccessSettings
    ) -> None:
        self._app, self._login_app, self._accounts, self._settings = app, login_app, accounts, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                app, receive = await self._authorize(scope, receive)
            except HTTPException as error:
                app = PlainTextResponse(error.detail, error.status_code, headers=error.headers)
            await app(scope, receive, send)

    async def _authorize(self, scope: Scope, receive: Receive) -> tuple[ASGIApp, Receive]:
        """Return the app that handles the request, and the channel to read its body from.

        Raises:
            HTTPException: The request is rejected.
        """
        scope["state"] = {**scope.get("state", {}), "user": None}
        path, request = scope["path"], Request(scope)
        raw = scope.get("raw_path")
        if is_ambiguous(path) or (raw is not None and is_ambiguous(raw.decode("latin-1"))):
            raise HTTPException(400, "Invalid URL.")
        if path in (HEALTH, METRICS) and request.method in _SAFE_METHODS:
            if path == METRICS:
                await self._check_token(request)
            return self._app, receive
        if request.headers.get("host", "").lower() not in self._settings.hosts:
            raise HTTPException(421, "Unknown host name: add it to access.origins in dashboard.yaml.")
        token = request.cookies.get(self._settings.cookie, "")
        active = POLL_HEADER not in request.headers
        user = await run_in_threadpool(self._accounts.find_user, token, active=active) if token else None
        _set_user(scope, user)
        if user is None and path not in PUBLIC_PATHS:
            raise _login_required(request)
        changes = request.method not in _SAFE_METHODS
        if changes:
            self._check_origin(request, required=path in PUBLIC_PATHS)
        if changes or "content-length" in request.headers or "transfer-encoding" in request.headers:
            body = await _read_body(request, receive, self._settings)
            if changes and user is not None and path not in PUBLIC_PATHS:
                await _check_csrf(Request(scope, _replay(body, receive)), user.csrf)
            receive = _replay(body, receive)
        return (self._login_app if path in LOGIN_PATHS else self._app), receive

    async def _check_token(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        find_token = self._accounts.find_token
        if kind.lower() != "bearer" or await run_in_threadpool(find_token, token.strip()) is None:
            raise HTTPException(
                401,
                "The metrics require a token: fedsigma users token NAME",
                headers={"WWW-Authenticate": 'Bearer realm="metrics"'},
            )

    def _check_origin(self, request: Request, *, required: bool) -> None:
        """Reject requests that a page of another site sent; also those without an origin if `required`."""
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            # `none` is a request by the user, not by a page.
            valid = site in ("same-origin", "none")
        elif origin is not None:
            valid = origin in self._settings.origins and origin.endswith(
                f"//{request.headers['host'].lower()}"
            )
        else:
            valid = not required
        if not valid:
            raise HTTPException(
                403, "This request was not sent by a page of the dashboard. Reload the page and try again."
            )


def _set_user(scope: Scope, user: User | None) -> None:
    """Set the user for the endpoints, and for Starlette's `requires`."""
    scope["state"]["user"] = user
    roles = [] if user is None else [VIEWER] if user.role == VIEWER else [VIEWER, user.role]
    scope["auth"] = AuthCredentials(roles)
    scope["user"] = SimpleUser(user.name) if user is not None else UnauthenticatedUser()


def _login_required(request: Request) -> HTTPException:
    """Return a redirect to the login page for a page, and an error for other requests."""
    path = quote(request.scope["path"]) + (f"?{request.url.query}" if request.url.query else "")
    next_path = local_path(path)
    login = LOGIN if next_path == "/" else f"{LOGIN}?next={quote(next_path, safe='')}"
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        return HTTPException(303, "Sign in first.", headers={"Location": login})
    return HTTPException(401, "Sign in first.", headers={"WWW-Authenticate": CHALLENGE})


async def _read_body(request: Request, receive: Receive, settings: AccessSettings) -> bytes:
    """Return the body of a request, which must be small and arrive in time."""
    text = f"The request is too large, expected at most {settings.body} bytes."
    too_large = HTTPException(413, text, headers={"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > settings.body:
        raise too_large
    body = bytearray()
    with anyio.move_on_after(settings.patience):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "The request is incomplete.")
            body += message.get("body", b"")
            if len(body) > settings.body:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)
    raise HTTPException(408, "The request timed out.", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that repeats the body that was read, followed by further messages of the client."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _check_csrf(request: Request, expected: str) -> None:
    """Reject a state-changing request without the CSRF token of the user's session."""
    token = request.headers.get(CSRF_HEADER)
    if token is None:
        try:
            async with request.form(max_files=8, max_fields=64) as form:
                field = form.get(CSRF_FIELD)
        except MultiPartException:
            raise HTTPException(400, "Invalid form.") from None
        token = field if isinstance(field, str) else ""
    if not secrets.compare_digest(token.encode("utf-8", "replace"), expected.encode("ascii")):
        raise HTTPException(403, "This form has expired. Reload the page and try again.")
