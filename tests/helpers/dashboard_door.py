"""A small app behind the dashboard's guard, and a browser in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.middleware import operator_only, require_login
from fedsigma.server.dashboard.auth.settings import AccessSettings

HOST = "dash.example.org"
ORIGIN = f"https://{HOST}"
PASSWORD = "correct horse battery"
ACCESS = AccessSettings(origins=(ORIGIN,))
QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
HTML = {"Accept": "text/html"}
FROM_US = {"Origin": ORIGIN}


class Clock:
    """The time, as a test wants it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class FakeLog:
    """Takes what is noted, or fails as a log on a full disk does."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self.error: Exception | None = None

    def record(self, kind: str, **fields: object) -> None:
        if self.error is not None:
            raise self.error
        self.lines.append({"kind": kind, **fields})


async def _home(request: Request) -> Response:
    user = request.state.user
    return JSONResponse({"name": user.name, "role": user.role}, headers={"X-Csrf-For-Tests": user.csrf})


@operator_only
async def _act(request: Request) -> Response:
    form = await request.form()
    return JSONResponse({key: value for key, value in form.items() if key != "csrf"})


@operator_only
def _act_later(request: Request) -> Response:
    return PlainTextResponse("done")


def _text(text: str) -> Any:
    async def answer(request: Request) -> Response:
        return PlainTextResponse(text)

    return answer


async def _broken(request: Request) -> Response:
    raise RuntimeError("broken")


def door(accounts: Accounts, *, settings: AccessSettings = ACCESS, log: Any = None, **more: Any) -> ASGIApp:
    """The app, guarded."""
    routes = [
        Route("/", _home),
        Route("/act", _act, methods=["POST"]),
        Route("/act-later", _act_later, methods=["POST"]),
        Route("/health", _text("well")),
        Route("/metrics", _text("fedsigma_up 1")),
        Route("/static/app.js", _text("1")),
        Route("/broken", _broken),
    ]
    return require_login(Starlette(routes=routes), accounts=accounts, settings=settings, log=log, **more)


def client(app: ASGIApp, origin: str = ORIGIN, *, address: str = "testclient") -> TestClient:
    """A browser."""
    return TestClient(
        app, base_url=origin, follow_redirects=False, raise_server_exceptions=False, client=(address, 50000)
    )


def sign_in(
    browser: TestClient,
    name: str,
    password: str = PASSWORD,
    *,
    check: bool = True,
    next: str = "/",
    headers: dict[str, str] | None = None,
) -> Any:
    """Send the form."""
    answer = browser.post(
        "/login",
        headers={"Origin": str(browser.base_url).rstrip("/"), **(headers or {})},
        data={"name": name, "password": password, "next": next},
    )
    assert not check or answer.status_code == 303, answer.text
    return answer


def csrf(browser: TestClient) -> str:
    """The word that the pages would hold."""
    return str(browser.get("/").headers["X-Csrf-For-Tests"])


@pytest.fixture(name="clock")
def clock_fixture() -> Clock:
    return Clock()


@pytest.fixture(name="accounts")
def accounts_fixture(tmp_path: Path, clock: Clock) -> Iterator[Accounts]:
    made = Accounts(tmp_path / "dashboard.db", clock=clock, hasher=QUICK)
    made.add_user("anna", role="operator", password=PASSWORD)
    made.add_user("vera", role="viewer", password=PASSWORD)
    yield made
    made.close()


@pytest.fixture(name="log")
def log_fixture() -> FakeLog:
    return FakeLog()


@pytest.fixture(name="visitor")
def visitor_fixture(accounts: Accounts, log: FakeLog) -> TestClient:
    """Not signed in."""
    return client(door(accounts, log=log))


@pytest.fixture(name="anna")
def anna_fixture(visitor: TestClient) -> TestClient:
    """An operator, signed in."""
    sign_in(visitor, "anna")
    return visitor
