"""The desk where people sign in and out: by password, an OpenID provider, or a link that is used once."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fedsigma.common.utils.hash_chain import LogTampered
from fedsigma.server.dashboard.auth.accounts import (
    LINK,
    OIDC,
    PASSWORD,
    VIEWER,
    Accounts,
    AccountsError,
)
from fedsigma.server.dashboard.auth.login_page import login_page
from fedsigma.server.dashboard.auth.oidc import Provider
from fedsigma.server.dashboard.auth.rate_limit import LoginRateLimiter
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.auth.urls import local_path
from fedsigma.server.deployment.audit_log import ServerAuditLog

__all__ = ["CHALLENGE", "LOGIN", "OPEN", "OWN", "LoginApp", "OneTimeLink"]

LOGIN, LOGOUT = "/login", "/logout"
OPEN = (LOGIN, *Provider.PATHS)
"""What is answered to who is not signed in."""
OWN = (*OPEN, LOGOUT)
"""What the desk answers, and not the app."""

CHALLENGE = f'Cookie form-action="{LOGIN}"'
_AT_ONCE = 2
"""Passwords that are checked at a time: each takes 64 MiB."""
_WAY_AND_BACK_S = 600


class OneTimeLink:
    """The word in the address by which one person gets into a dashboard of one's own machine, once."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self._left = True
        self._lock = threading.Lock()

    def take(self, token: str) -> bool:
        """Whether it is the word; from then on, none is."""
        with self._lock:
            good = self._left and secrets.compare_digest(
                token.encode("utf-8", "replace"), self.token.encode()
            )
            self._left = self._left and not good
            return good


class LoginApp:
    """An ASGI app for /login, /logout and the way to an OpenID provider. See `guarded` for the arguments."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        settings: AccessSettings,
        oidc: Provider | None,
        link: OneTimeLink | None,
        log: ServerAuditLog | None,
    ) -> None:
        self._accounts, self._settings = accounts, settings
        self._oidc, self._link, self._log = oidc, link, log
        self._attempts = LoginRateLimiter(settings)
        self._hashing = anyio.CapacityLimiter(_AT_ONCE)
        routes = [
            Route(LOGIN, self._show, methods=["GET"]),
            Route(LOGIN, self._sign_in, methods=["POST"]),
            Route(LOGOUT, self._sign_out, methods=["POST"]),
        ]
        middleware = []
        if oidc is not None:
            routes.append(Route(Provider.PATHS[0], self._leave, methods=["GET"]))
            routes.append(Route(Provider.PATHS[1], self._come_back, methods=["GET"]))
            # What is needed on the way to the provider and back. A new key each time the process starts.
            kept = Middleware(
                SessionMiddleware,
                secret_key=secrets.token_urlsafe(32),
                session_cookie=f"{settings.cookie}-oidc",
                max_age=_WAY_AND_BACK_S,
                same_site="lax",
                https_only=settings.secure,
            )
            middleware.append(kept)
        self._app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={LogTampered: self._not_noted, OSError: self._not_noted},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._app(scope, receive, send)

    # -- name and password ---------------------------------------------------------------------------------

    async def _show(self, request: Request) -> Response:
        place = local_path(request.query_params.get("next", "/"))
        if request.state.user is not None:
            return RedirectResponse(place, 303)
        token = request.query_params.get("token")
        # Whoever only looks at the link, as some programs do by HEAD, does not use it up.
        if self._link is None or token is None or request.method != "GET":
            return self._page(next_path=place)
        wait = self._attempts.wait(_address(request))
        if wait:
            return self._later(wait, next_path=place)
        if not self._link.take(token):
            return self._page(
                error="This link was used, or is of another start: use the one printed last.", status=403
            )
        return await self._let_in(request, "local", way=LINK, role=VIEWER, place=place)

    async def _sign_in(self, request: Request) -> Response:
        async with request.form(max_files=0, max_fields=8) as form:
            name, password = _text(form, "name").strip().lower(), _text(form, "password")
            place = local_path(_text(form, "next"))
        if self._link is not None:
            return self._page(error="There are no passwords here.", status=403)
        wait = self._attempts.wait(_address(request), name)
        if wait:
            return self._later(wait, next_path=place, name=name)
        if await anyio.to_thread.run_sync(self._accounts.verify, name, password, limiter=self._hashing):
            self._attempts.forget(name)
            return await self._let_in(request, name, way=PASSWORD, place=place)
        await self._note_refused(request, way=PASSWORD, user=await run_in_threadpool(self._known, name))
        return self._page(
            error="Name or password is wrong. Who runs the server can set a new password:"
            " fedsigma users password NAME",
            status=401,
            headers={"WWW-Authenticate": CHALLENGE},
            name=name[:64],
            next_path=place,
        )

    async def _sign_out(self, request: Request) -> Response:
        user = request.state.user
        await run_in_threadpool(self._accounts.end, request.cookies.get(self._settings.cookie, ""))
        await self._note("dashboard_signed_out", user=user.name)
        answer = RedirectResponse(LOGIN, 303)
        answer.delete_cookie(self._settings.cookie, **self._cookie())
        return answer

    # -- OpenID provider -----------------------------------------------------------------------------------

    async def _leave(self, request: Request) -> Response:
        assert self._oidc is not None
        place = local_path(request.query_params.get("next", "/"))
        wait = self._attempts.wait(_address(request))
        if wait:
            return self._later(wait, next_path=place)
        request.session.clear()
        request.session["next"] = place
        try:
            return await self._oidc.leave(request)
        except Exception as error:
            # Whatever a provider's answer breaks, nobody gets in; its text could hold anything.
            return await self._provider_failed(request, error)

    async def _come_back(self, request: Request) -> Response:
        assert self._oidc is not None
        place = local_path(str(request.session.get("next", "/")))
        try:
            person = await self._oidc.come_back(request)
        except Exception as error:
            return await self._provider_failed(request, error)
        finally:
            request.session.clear()
        if person.role is None:
            await self._note_refused(request, way=OIDC, user=person.name, subject=person.subject)
            known = f"You are known to {self._oidc.settings.name}"
            text = f"{known}, but may not see this dashboard: ask who runs the server."
            return self._page(error=text, status=403)
        return await self._let_in(
            request, person.name, way=OIDC, role=person.role, place=place, subject=person.subject
        )

    async def _provider_failed(self, request: Request, error: Exception) -> Response:
        assert self._oidc is not None
        # Anybody can call the way back with nonsense: that shall not fill the audit log.
        wait = self._attempts.wait(_address(request))
        if wait:
            return self._later(wait)
        await self._note_refused(request, way=OIDC, user="", reason=type(error).__name__)
        text = f"Signing in with {self._oidc.settings.name} did not work. Try once more; if it stays so,"
        return self._page(error=text + " who runs the server finds the kind of error in its log.", status=403)

    # -- what all have in common ---------------------------------------------------------------------------

    async def _let_in(
        self, request: Request, name: str, *, way: str, place: str, role: str = "", **more: str
    ) -> Response:
        """Open a new session, whatever cookie the browser came with, and end the one it had."""
        await self._note("dashboard_signed_in", user=name, way=way, address=_address(request), **more)
        old = request.cookies.get(self._settings.cookie, "")
        try:
            token = await run_in_threadpool(self._accounts.open, name, way=way, role=role)
        except AccountsError:
            return self._page(error="This account was removed or disabled just now.", status=403)
        await run_in_threadpool(self._accounts.end, old)
        answer = RedirectResponse(place, 303)
        answer.set_cookie(self._settings.cookie, token, **self._cookie())
        return answer

    def _cookie(self) -> dict[str, Any]:
        # A provider sends people back from another site, and a strict cookie would not be sent then.
        same = "lax" if self._oidc is not None else "strict"
        return {"path": "/", "secure": self._settings.secure, "httponly": True, "samesite": same}

    def _page(self, **values: Any) -> Response:
        provider = self._oidc.settings.name if self._oidc is not None else ""
        return login_page(passwords=self._link is None, provider=provider, **values)

    def _later(self, wait: int, **values: Any) -> Response:
        text = f"Too many attempts. Try again in {wait} seconds" if wait < 90 else ""
        text = text or f"Too many attempts. Try again in {-(-wait // 60)} minutes"
        return self._page(error=text + ".", status=429, headers={"Retry-After": str(wait)}, **values)

    def _known(self, name: str) -> str:
        """The name, if somebody has it: what else is typed there may be a password."""
        return name if self._accounts.has(name) else ""

    async def _note_refused(self, request: Request, **fields: str) -> None:
        await self._note("dashboard_refused", address=_address(request), **fields)

    async def _note(self, kind: str, **fields: str) -> None:
        if self._log is not None:
            await run_in_threadpool(self._log.record, kind, **fields)

    async def _not_noted(self, request: Request, error: Exception) -> Response:
        """Without its line in the audit log, nobody gets in."""
        text = (
            "The server's audit log cannot be written, so nobody can sign in: fedsigma audit verify says why."
        )
        return self._page(error=text, status=503)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _text(form: FormData, key: str) -> str:
    value = form.get(key)
    return value if isinstance(value, str) else ""
