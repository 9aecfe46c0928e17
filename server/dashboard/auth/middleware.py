"""Lets nothing through to the dashboard that is not signed in, or sent from a page of another site.

Around the app, from outside to inside: the headers of every answer, the client's address as a trusted proxy
tells it, and the guard. What signing in needs is answered beside the app, which never sees it.
"""

from __future__ import annotations

import secrets
from urllib.parse import quote, urlsplit

import anyio
from starlette.authentication import AuthCredentials, SimpleUser, UnauthenticatedUser, requires
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsigma.server.dashboard.auth.accounts import OPERATOR, VIEWER, Accounts, User
from fedsigma.server.dashboard.auth.login import CHALLENGE, LOGIN, OPEN, OWN, LoginApp, OneTimeLink
from fedsigma.server.dashboard.auth.oidc import Provider
from fedsigma.server.dashboard.auth.security_headers import SecurityHeadersMiddleware
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.auth.urls import local_path, strange
from fedsigma.server.deployment.audit_log import ServerAuditLog

__all__ = ["CSRF_FIELD", "CSRF_HEADER", "POLL_HEADER", "guarded", "operator_only"]

CSRF_FIELD, CSRF_HEADER = "csrf", "X-CSRF-Token"
"""Where a request that changes something says `request.state.user.csrf`: a form's field, or a header."""

POLL_HEADER = "X-Poll"
"""What a page says with a request that it makes by itself: nobody is sitting there for that reason."""

HEALTH, MEASURES = "/health", "/metrics"
_READING = ("GET", "HEAD")

operator_only = requires(OPERATOR)
"""Decorates an endpoint that only operators may call: 403 for others. It is Starlette's `requires`."""


def guarded(
    app: ASGIApp,
    *,
    accounts: Accounts,
    settings: AccessSettings,
    oidc: Provider | None = None,
    link: OneTimeLink | None = None,
    log: ServerAuditLog | None = None,
) -> ASGIApp:
    """An app to which only those get through who are signed in.

    Requests have `request.state.user`, a `User`; it is None at /health, which all may ask, and at /metrics,
    which takes a program's token and nothing else. Serve it with uvicorn's own `proxy_headers` off.

    Args:
        app: the dashboard: any ASGI app.
        accounts: who may sign in.
        settings: how it is reached.
        oidc: an OpenID provider where people may sign in instead.
        link: the only way in, for a dashboard without users.
        log: the server's audit log, where there is one.
    """
    desk = LoginApp(accounts=accounts, settings=settings, oidc=oidc, link=link, log=log)
    inner: ASGIApp = ServerErrorMiddleware(
        AuthMiddleware(app, desk=desk, accounts=accounts, settings=settings)
    )
    if settings.proxies:
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

        inner = ProxyHeadersMiddleware(inner, trusted_hosts=list(settings.proxies))  # type: ignore[assignment, arg-type]
    return SecurityHeadersMiddleware(inner, secure=settings.secure)


class AuthMiddleware:
    """Answers what may not pass, and passes the rest to the app or to the desk where people sign in."""

    def __init__(self, app: ASGIApp, *, desk: LoginApp, accounts: Accounts, settings: AccessSettings) -> None:
        self._app, self._desk, self._accounts, self._settings = app, desk, accounts, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                app, receive = await self._passed(scope, receive)
            except HTTPException as refusal:
                app = PlainTextResponse(refusal.detail, refusal.status_code, headers=refusal.headers)
            await app(scope, receive, send)

    async def _passed(self, scope: Scope, receive: Receive) -> tuple[ASGIApp, Receive]:
        """Who is to answer, and what is read from the client.

        Raises:
            HTTPException: the request may not pass.
        """
        scope["state"] = {**scope.get("state", {}), "user": None}
        path, request = scope["path"], Request(scope)
        raw = scope.get("raw_path")
        if strange(path) or (raw is not None and strange(raw.decode("latin-1"))):
            raise HTTPException(400, "This address is not written as the dashboard writes its own.")
        if path in (HEALTH, MEASURES) and request.method in _READING:
            if path == MEASURES:
                await self._check_program(request)
            return self._app, receive
        if request.headers.get("host", "").lower() not in self._settings.hosts:
            raise HTTPException(421, "The dashboard is not known by this name: see access.origins.")
        token = request.cookies.get(self._settings.cookie, "")
        used = POLL_HEADER not in request.headers
        user = await run_in_threadpool(self._accounts.find, token, used=used) if token else None
        _tell(scope, user)
        if user is None and path not in OPEN:
            raise _sign_in_first(request)
        changes = request.method not in _READING
        if changes:
            self._check_origin(request, must=path in OPEN)
        if changes or "content-length" in request.headers or "transfer-encoding" in request.headers:
            body = await _whole(request, receive, self._settings)
            if changes and user is not None and path not in OPEN:
                await _check_csrf(Request(scope, _once_more(body, receive)), user)
            receive = _once_more(body, receive)
        return (self._desk if path in OWN else self._app), receive

    async def _check_program(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if kind.lower() == "bearer" else ""
        if not token or await run_in_threadpool(self._accounts.token_name, token) is None:
            raise HTTPException(
                401,
                "Metrics take a token: fedsigma users token NAME",
                headers={"WWW-Authenticate": 'Bearer realm="metrics"'},
            )

    def _check_origin(self, request: Request, *, must: bool) -> None:
        """Refuse what a page of another site had a browser send; `must`: and what does not say where from."""
        site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
        if site is not None:
            # `none`: no page at all, but the person.
            good = site in ("same-origin", "none")
        elif origin is not None:
            good = origin in self._settings.origins and origin.endswith(
                f"//{request.headers['host'].lower()}"
            )
        else:
            good = not must
        if not good:
            raise HTTPException(403, "This was not sent from a page of the dashboard. Open it and try again.")


def _tell(scope: Scope, user: User | None) -> None:
    """Say who it is: in FedSigma's own words, and in those of Starlette's `requires`."""
    scope["state"]["user"] = user
    roles = [] if user is None else [VIEWER] if user.role == VIEWER else [VIEWER, user.role]
    scope["auth"] = AuthCredentials(roles)
    scope["user"] = SimpleUser(user.name) if user is not None else UnauthenticatedUser()


def _sign_in_first(request: Request) -> HTTPException:
    """A page that a person opens leads to the sign-in and back; a program, or a part of a page, is told."""
    headers = request.headers
    place = quote(request.scope["path"]) + (f"?{request.url.query}" if request.url.query else "")
    by_script = "hx-request" in headers
    if by_script:
        page = urlsplit(headers.get("hx-current-url", ""))
        place = page.path + (f"?{page.query}" if page.query else "")
    local = local_path(place)
    login = LOGIN if local == "/" else f"{LOGIN}?next={quote(local, safe='')}"
    if request.method == "GET" and "text/html" in headers.get("accept", "") and not by_script:
        return HTTPException(303, "Sign in first.", headers={"Location": login})
    told = {"HX-Redirect": login} if by_script else {}
    return HTTPException(401, "Sign in first.", headers={"WWW-Authenticate": CHALLENGE, **told})


async def _whole(request: Request, receive: Receive, settings: AccessSettings) -> bytes:
    """What the client sends, which has to be little and to come soon."""
    told = request.headers.get("content-length", "0")
    if not told.isdecimal() or int(told[:20]) > settings.body:
        raise _too_large(settings)
    body = bytearray()
    with anyio.move_on_after(settings.patience):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "The request ended early.")
            body += message.get("body", b"")
            if len(body) > settings.body:
                raise _too_large(settings)
            if not message.get("more_body", False):
                return bytes(body)
    raise HTTPException(408, "The request took too long to arrive.", headers={"Connection": "close"})


def _too_large(settings: AccessSettings) -> HTTPException:
    text = f"A request may have {settings.body} bytes."
    return HTTPException(413, text, headers={"Connection": "close"})


def _once_more(body: bytes, receive: Receive) -> Receive:
    """What gives the body that was read already, and then what the client does next."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _check_csrf(request: Request, user: User) -> None:
    """Refuse a change that does not hold the word which only our own pages know."""
    told = request.headers.get(CSRF_HEADER)
    if told is None:
        try:
            async with request.form(max_files=8, max_fields=64) as form:
                field = form.get(CSRF_FIELD)
        except MultiPartException:
            raise HTTPException(400, "The form cannot be read.") from None
        told = field if isinstance(field, str) else ""
    if not secrets.compare_digest(told.encode("utf-8", "replace"), user.csrf.encode("ascii")):
        raise HTTPException(403, "This form is out of date. Open the page again and repeat what you did.")
