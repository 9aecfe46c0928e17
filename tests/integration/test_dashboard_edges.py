"""The dashboard's guard at its edges: strange addresses, limits, headers, what is noted."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fedsigma.common.utils.hash_chain import LogTampered
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.rate_limit import LoginRateLimiter
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.auth.urls import local_path
from tests.helpers.dashboard_door import (
    FROM_US,
    HOST,
    HTML,
    ORIGIN,
    PASSWORD,
    Clock,
    FakeLog,
    client,
    csrf,
    door,
    sign_in,
)

STRANGE = ["//", "//health", "/health/..", "/health/../", "/health/%2e%2e/", "/health/%2E./act"]
STRANGE += ["/login/../act", "/login/..%2fact", "/login//..//act", "/.//act", "/./act", "/static//a"]
STRANGE += ["/health%2f..%2fact", "/health\\..\\act", "/health%5c..%5cact", "/health%00", "/health%0a"]
STRANGE += ["/static/%2e%2e/%2e%2e/etc/passwd", "https://dash.example.org/health", "health", "*"]


@pytest.mark.parametrize("path", STRANGE)
def test_ambiguous_urls_are_rejected(anna: TestClient, path: str) -> None:
    assert raw_get(anna, path) == 400
    anna.cookies.clear()
    assert raw_get(anna, path) == 400


def raw_get(browser: TestClient, path: str) -> int:
    """Send a path as it stands; httpx would put it in order first."""
    statuses: list[int] = []
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", HOST.encode()), (b"accept", b"text/html"), (b"cookie", cookie.encode())],
        "client": ("192.0.2.1", 1234),
        "server": ("dash", 443),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    anyio.run(browser.app, scope, receive, send)
    return statuses[0]


@pytest.mark.parametrize("path", ["/Health", "/%68ealthy", "/health;x", "/LOGIN/x", "/loginx"])
def test_paths_similar_to_public_ones_need_a_session(visitor: TestClient, path: str) -> None:
    assert raw_get(visitor, path) == 303
    assert visitor.get(path).status_code == 401


def test_unknown_host_names_are_rejected(anna: TestClient) -> None:
    for host in ("evil.example", HOST + ":8443", HOST + ".", ""):
        assert anna.get("/", headers={"Host": host}).status_code == 421


def test_web_sockets_are_rejected(anna: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), anna.websocket_connect("/live"):
        pass


def where_a_browser_goes(place: str) -> str:
    """The host that a browser would go to from the sign-in, by the rules of the URL standard."""
    text = re.sub(r"[\t\n\r]", "", place.strip("".join(map(chr, range(33))))).replace("\\", "/")
    return str(urlsplit(urljoin(ORIGIN + "/login", text)).netloc)


PLACES = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="/\\.:@?#%\t\n\r evilEXAMPLE.com25fc0", max_size=40),
    st.tuples(
        st.sampled_from(
            ["/", "//", "///", "/\\", "\\\\", "/\t/", "https://", "javascript:", "/%2f", "/.//", " /"]
        ),
        st.sampled_from(["evil.example", "evil.example/path", "@evil.example", ""]),
    ).map("".join),
)


@given(PLACES)
def test_local_path_never_leads_to_another_host(place: str) -> None:
    safe = local_path(place)
    assert safe == place or safe == "/"
    assert where_a_browser_goes(safe) == HOST
    assert safe.isascii() and safe.isprintable() and " " not in safe


@given(st.lists(st.from_regex(r"[A-Za-z0-9_@-][A-Za-z0-9._@-]{0,8}", fullmatch=True), max_size=4))
def test_local_path_accepts_pages_of_the_dashboard(parts: list[str]) -> None:
    place = "/runs/" + "/".join(parts)
    assert local_path(place + "?page=2&by=name") == place + "?page=2&by=name"


ELSEWHERE = ["//evil.example", "/\\evil.example", "https://evil.example", "/login", "/logout", "/%2e%2e/"]
ELSEWHERE += [
    "/runs?a=1\r\nSet-Cookie: a=b",
    "/runs?a=\n",
    "/runs\t",
    "/a b",
    "/\u00e9",
    "/?a=\u2028",
    "/?<b>",
]
ELSEWHERE += ["/" + "a" * 2000]


@pytest.mark.parametrize("place", ELSEWHERE)
def test_login_does_not_redirect_elsewhere(visitor: TestClient, place: str) -> None:
    assert sign_in(visitor, "anna", next=place).headers["location"] == "/"
    assert visitor.get("/login", params={"next": place}).headers["location"] == "/"


def test_login_attempts_are_limited_by_name(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch, log: FakeLog
) -> None:
    times = Clock()
    monkeypatch.setattr("time.time", times)
    visitor = client(door(accounts, log=log))
    for _ in range(10):
        assert sign_in(visitor, "anna", "not the password", check=False).status_code == 401
        times.now += 1
    noted = len(log.lines)
    answer = sign_in(visitor, "ANNA ", check=False)
    assert answer.status_code == 429
    assert 280 <= int(answer.headers["retry-after"]) <= 300
    assert "Try again in 5 minutes" in answer.text
    assert len(log.lines) == noted
    assert sign_in(visitor, "vera", check=False).status_code == 303
    times.now += 300
    assert sign_in(visitor, "anna", check=False).status_code == 303


def test_login_resets_the_rate_limit_of_the_name(visitor: TestClient) -> None:
    for _ in range(9):
        assert sign_in(visitor, "anna", "not the password", check=False).status_code == 401
    assert sign_in(visitor, "anna", check=False).status_code == 303
    for _ in range(9):
        assert sign_in(visitor, "anna", "not the password", check=False).status_code == 401


def test_login_attempts_are_limited_by_address(visitor: TestClient) -> None:
    statuses = [sign_in(visitor, f"user{n}", "no", check=False).status_code for n in range(31)]
    assert statuses == [401] * 30 + [429]
    assert sign_in(visitor, "anna", check=False).status_code == 429


def test_rate_limit_counts_ipv6_networks() -> None:
    attempts = LoginRateLimiter(AccessSettings(origins=(ORIGIN,), per_address=2))
    assert [attempts.register_attempt(f"2001:db8:1:2::{n}") > 0 for n in range(3)] == [False, False, True]
    assert attempts.register_attempt("2001:db8:1:3::1") == 0
    assert [attempts.register_attempt(text) > 0 for text in ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1")][2]


def test_forwarded_address_needs_a_trusted_proxy(accounts: Accounts) -> None:
    log = FakeLog()
    for proxies, expected in [((), "203.0.113.9"), (("203.0.113.0/24",), "198.51.100.7")]:
        settings = AccessSettings(origins=(ORIGIN,), proxies=proxies)
        browser = client(door(accounts, settings=settings, log=log), address="203.0.113.9")
        told = {"X-Forwarded-For": "192.0.2.66, 198.51.100.7"}
        sign_in(browser, "anna", "not the password", check=False, headers=told)
        assert log.lines[-1]["address"] == expected


def test_large_requests_are_rejected(anna: TestClient) -> None:
    big = {"csrf": csrf(anna), "study": "x" * 65536}
    assert anna.post("/act", headers=FROM_US, data=big).status_code == 413
    assert anna.post("/login", headers=FROM_US, data={"name": "x" * 65536}).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(9):
            yield b"x" * 8192

    assert anna.post("/act", headers=FROM_US, content=pieces()).status_code == 413
    assert anna.post("/act", headers={**FROM_US, "Content-Length": "-1"}, content=b"x").status_code == 413


def test_all_responses_have_security_headers(anna: TestClient) -> None:
    answers = [anna.get("/"), anna.get("/none"), anna.get("/broken"), anna.post("/act"), anna.get("/health")]
    answers += [anna.get("/", headers={"Host": "evil.example"}), anna.get("/static/app.js?v=1")]
    anna.cookies.clear()
    answers += [anna.get("/"), anna.get("/", headers=HTML), anna.get("/metrics"), anna.get("/login")]
    assert [a.status_code for a in answers] == [200, 404, 500, 403, 200, 421, 200, 401, 303, 401, 200]
    for answer in answers:
        headers = answer.headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["form-action"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["strict-transport-security"].startswith("max-age=")
        assert "camera=()" in headers["permissions-policy"]
        kept = "/static/" in str(answer.request.url)
        assert headers["cache-control"] == ("private, max-age=31536000, immutable" if kept else "no-store")


def test_internal_error_denies_access(
    visitor: TestClient, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(token: str, *, active: bool) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(accounts, "find_user", broken)
    visitor.cookies.set("__Host-fedsigma", "x")
    answer = visitor.get("/")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_poll_header_marks_requests_as_inactive(
    visitor: TestClient, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(accounts, "find_user", lambda token, *, active: said.append(active))
    visitor.cookies.set("__Host-fedsigma", "x")
    visitor.get("/")
    visitor.get("/", headers={"X-Poll": "1"})
    assert said == [True, False]


def test_login_page_style_matches_its_content_policy(visitor: TestClient) -> None:
    answer = visitor.get("/login")
    style = re.search(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert not re.search(r'\sstyle="|\son[a-z]+="', answer.text)


def test_audit_log_has_logins_but_no_secrets(visitor: TestClient, log: FakeLog) -> None:
    sign_in(visitor, "anna", "not the password", check=False)
    sign_in(visitor, "my-password-by-mistake", "x", check=False)
    sign_in(visitor, "anna")
    here = {"address": "testclient"}
    assert log.lines == [
        {"kind": "dashboard_refused", "method": "password", "user": "anna", **here},
        {"kind": "dashboard_refused", "method": "password", "user": "", **here},
        {"kind": "dashboard_signed_in", "method": "password", "user": "anna", **here},
    ]
    text = json.dumps(log.lines)
    for secret in (PASSWORD, "not the password", "by-mistake", visitor.cookies["__Host-fedsigma"]):
        assert secret not in text


@pytest.mark.parametrize("error", [OSError("disk"), LogTampered(Path("audit.jsonl"), 3, "was changed")])
def test_login_is_denied_if_the_audit_log_fails(accounts: Accounts, error: Exception) -> None:
    log = FakeLog()
    log.error = error
    visitor = client(door(accounts, log=log))
    answer = sign_in(visitor, "anna", check=False)
    assert answer.status_code == 503
    assert "fedsigma audit verify" in answer.text
    assert "set-cookie" not in answer.headers
    assert visitor.get("/").status_code == 401
