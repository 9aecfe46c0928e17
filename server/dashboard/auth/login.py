"""Signing in and out: by password, by an OpenID provider, or by a one-time link."""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
from pathlib import Path
from typing import Any

import anyio
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fedsigma.common.utils.hash_chain import LogTampered
from fedsigma.server.dashboard.auth.accounts import LINK, OIDC, PASSWORD, Accounts
from fedsigma.server.dashboard.auth.oidc import OidcProvider
from fedsigma.server.dashboard.auth.passwords import VIEWER, AccountsError
from fedsigma.server.dashboard.auth.rate_limit import LoginRateLimiter
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.auth.urls import local_path
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.report.style import SCHEMES

__all__ = ["CHALLENGE", "LOGIN", "LOGIN_PATHS", "PUBLIC_PATHS", "LoginApp", "OneTimeLink"]

LOGIN, LOGOUT = "/login", "/logout"
PUBLIC_PATHS = (LOGIN, *OidcProvider.PATHS)
"""Paths that are served without a session."""
LOGIN_PATHS = (*PUBLIC_PATHS, LOGOUT)
"""Paths that `LoginApp` serves."""

CHALLENGE = f'Cookie form-action="{LOGIN}"'
"""Header `WWW-Authenticate` of responses that require a session."""
_MAX_PARALLEL_HASHES = 2
"""Number of passwords that are verified at a time; each takes 64 MiB of memory."""
_OIDC_STATE_S = 600
"""Lifetime of the state that is kept while the user is at the OpenID provider."""

_TEMPLATES = Path(__file__).parents[1] / "templates"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_STYLE = SCHEMES + (_TEMPLATES / "login.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)


class OneTimeLink:
    """The token of a link that signs in one browser, once."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self._unused = True
        self._lock = threading.Lock()

    def redeem(self, token: str) -> bool:
        """Return whether the token is correct and unused, and mark it as used."""
        with self._lock:
            valid = self._unused and secrets.compare_digest(
                token.encode("utf-8", "replace"), self.token.encode()
            )
            self._unused = self._unused and not valid
            return valid


class LoginApp:
    """An ASGI app for /login, /logout and the OpenID redirects; see `require_login` for the arguments."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        settings: AccessSettings,
        oidc: OidcProvider | None,
        link: OneTimeLink | None,
        log: ServerAuditLog | None,
    ) -> None:
        self._accounts, self._settings = accounts, settings
        self._oidc, self._link, self._log = oidc, link, log
        self._rate_limiter = LoginRateLimiter(settings)
        self._hash_limiter = anyio.CapacityLimiter(_MAX_PARALLEL_HASHES)
        routes = [
            Route(LOGIN, self._show, methods=["GET"]),
            Route(LOGIN, self._sign_in, methods=["POST"]),
            Route(LOGOUT, self._sign_out, methods=["POST"]),
        ]
        middleware = []
        if oidc is not None:
            routes.append(Route(OidcProvider.PATHS[0], self._oidc_redirect, methods=["GET"]))
            routes.append(Route(OidcProvider.PATHS[1], self._oidc_callback, methods=["GET"]))
            # Keeps the state of the OpenID flow, signed by a key that changes with each start of the process.
            session = Middleware(
                SessionMiddleware,
                secret_key=secrets.token_urlsafe(32),
                session_cookie=f"{settings.cookie}-oidc",
                max_age=_OIDC_STATE_S,
                same_site="lax",
                https_only=settings.secure,
            )
            middleware.append(session)
        self._app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={LogTampered: self._log_failed, OSError: self._log_failed},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        await self._app(scope, receive, send)

    async def _show(self, request: Request) -> Response:
        next_path = local_path(request.query_params.get("next", "/"))
        if request.state.user is not None:
            return RedirectResponse(next_path, 303)
        token = request.query_params.get("token")
        # HEAD requests, such as link previews, do not use up the link.
        if self._link is None or token is None or request.method != "GET":
            return self._page(next_path=next_path)
        wait = self._rate_limiter.register_attempt(_address(request))
        if wait:
            return self._too_many_attempts(wait, next_path=next_path)
        if not self._link.redeem(token):
            return self._page(
                error="This link is invalid or was already used. Use the link that was printed last.",
                status=403,
            )
        return await self._open_session(request, "local", method=LINK, role=VIEWER, next_path=next_path)

    async def _sign_in(self, request: Request) -> Response:
        async with request.form(max_files=0, max_fields=8) as form:
            name, password = _text(form, "name").strip().lower(), _text(form, "password")
            next_path = local_path(_text(form, "next"))
        if self._link is not None:
            return self._page(error="This dashboard has no passwords.", status=403)
        wait = self._rate_limiter.register_attempt(_address(request), name)
        if wait:
            return self._too_many_attempts(wait, next_path=next_path, name=name)
        verify = self._accounts.verify_password
        if await anyio.to_thread.run_sync(verify, name, password, limiter=self._hash_limiter):
            self._rate_limiter.reset(name)
            return await self._open_session(request, name, method=PASSWORD, next_path=next_path)
        # Other input may be a password typed by mistake.
        is_user = await run_in_threadpool(self._accounts.has_user, name)
        await self._record_refusal(request, method=PASSWORD, user=name if is_user else "")
        return self._page(
            error="Invalid name or password. The server's administrator can set a new password:"
            " fedsigma users password NAME",
            status=401,
            headers={"WWW-Authenticate": CHALLENGE},
            name=name[:64],
            next_path=next_path,
        )

    async def _sign_out(self, request: Request) -> Response:
        user = request.state.user
        await run_in_threadpool(self._accounts.end_session, request.cookies.get(self._settings.cookie, ""))
        await self._record("dashboard_signed_out", user=user.name)
        response = RedirectResponse(LOGIN, 303)
        response.delete_cookie(self._settings.cookie, **self._cookie_options())
        return response

    async def _oidc_redirect(self, request: Request) -> Response:
        assert self._oidc is not None
        next_path = local_path(request.query_params.get("next", "/"))
        wait = self._rate_limiter.register_attempt(_address(request))
        if wait:
            return self._too_many_attempts(wait, next_path=next_path)
        request.session.clear()
        request.session["next"] = next_path
        try:
            return await self._oidc.redirect_to_provider(request)
        except Exception as error:
            # Any error denies access; its text comes from the provider and is not shown.
            return await self._oidc_failed(request, error)

    async def _oidc_callback(self, request: Request) -> Response:
        assert self._oidc is not None
        next_path = local_path(str(request.session.get("next", "/")))
        try:
            user = await self._oidc.handle_callback(request)
        except Exception as error:
            return await self._oidc_failed(request, error)
        finally:
            request.session.clear()
        if user.role is None:
            await self._record_refusal(request, method=OIDC, user=user.name, subject=user.subject)
            text = (
                f"You signed in to {self._oidc.settings.name}, but you have no access to this dashboard."
                " Ask the server's administrator."
            )
            return self._page(error=text, status=403)
        return await self._open_session(
            request, user.name, method=OIDC, role=user.role, next_path=next_path, subject=user.subject
        )

    async def _oidc_failed(self, request: Request, error: Exception) -> Response:
        assert self._oidc is not None
        # Anyone can send invalid requests to the callback: they must not fill the audit log.
        wait = self._rate_limiter.register_attempt(_address(request))
        if wait:
            return self._too_many_attempts(wait)
        await self._record_refusal(request, method=OIDC, user="", reason=type(error).__name__)
        text = (
            f"Signing in with {self._oidc.settings.name} failed. Try again; if it fails again, the"
            " server's administrator finds the kind of error in the audit log."
        )
        return self._page(error=text, status=403)

    async def _open_session(
        self, request: Request, name: str, *, method: str, next_path: str, role: str = "", **fields: str
    ) -> Response:
        """Open a new session and end the one that the browser had, which prevents session fixation."""
        await self._record(
            "dashboard_signed_in", user=name, method=method, address=_address(request), **fields
        )
        old_token = request.cookies.get(self._settings.cookie, "")
        try:
            token = await run_in_threadpool(self._accounts.open_session, name, method=method, role=role)
        except AccountsError:
            return self._page(error="This account was removed or disabled.", status=403)
        await run_in_threadpool(self._accounts.end_session, old_token)
        response = RedirectResponse(next_path, 303)
        response.set_cookie(self._settings.cookie, token, **self._cookie_options())
        return response

    def _cookie_options(self) -> dict[str, Any]:
        # The provider redirects from another site, and browsers do not send strict cookies then.
        same_site = "lax" if self._oidc is not None else "strict"
        return {"path": "/", "secure": self._settings.secure, "httponly": True, "samesite": same_site}

    def _page(
        self,
        *,
        error: str = "",
        status: int = 200,
        next_path: str = "/",
        name: str = "",
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Return the login page, with `name` filled in and a redirect to `next_path` after signing in."""
        html = _ENVIRONMENT.get_template("login.html").render(
            style=Markup(_STYLE),
            passwords=self._link is None,
            provider=self._oidc.settings.name if self._oidc is not None else "",
            next=next_path,
            name=name,
            error=error,
        )
        return HTMLResponse(html, status, headers={"Content-Security-Policy": _POLICY, **(headers or {})})

    def _too_many_attempts(self, wait: int, **values: Any) -> Response:
        time = f"{wait} seconds" if wait < 90 else f"{-(-wait // 60)} minutes"
        text = f"Too many attempts. Try again in {time}."
        return self._page(error=text, status=429, headers={"Retry-After": str(wait)}, **values)

    async def _record_refusal(self, request: Request, **fields: str) -> None:
        await self._record("dashboard_refused", address=_address(request), **fields)

    async def _record(self, kind: str, **fields: str) -> None:
        if self._log is not None:
            await run_in_threadpool(self._log.record, kind, **fields)

    async def _log_failed(self, request: Request, error: Exception) -> Response:
        """Deny access, because it cannot be recorded in the audit log."""
        text = (
            "The server's audit log cannot be written, so signing in is disabled: run fedsigma audit verify."
        )
        return self._page(error=text, status=503)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _text(form: FormData, key: str) -> str:
    value = form.get(key)
    return value if isinstance(value, str) else ""
