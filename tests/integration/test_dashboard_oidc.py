"""Signing in to the dashboard by an OpenID provider: a real one over HTTP, honest and not."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import oidc_provider_mock
import pytest
import uvicorn
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from werkzeug.serving import make_server

from fedsigma.common.config.schema import ConfigError
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.oidc import OidcProvider, OidcSettings
from fedsigma.server.dashboard.auth.settings import AccessSettings
from tests.helpers.dashboard_door import HOST, HTML, ORIGIN, QUICK, FakeLog, client, door

PEOPLE = (
    oidc_provider_mock.User(
        sub="7", claims={"preferred_username": "Ona", "groups": ["staff", "fl-operators"]}
    ),
    oidc_provider_mock.User(sub="8", claims={"preferred_username": "Vic", "groups": "fl-viewers"}),
    oidc_provider_mock.User(sub="9", claims={"preferred_username": "Eve", "groups": ["fl-operators-not"]}),
)
COOKIE = "__Host-fedsigma"
Change = Callable[[dict[str, Any]], Any]


class Lying:
    """The provider, some of whose answers are changed on their way; keeps the forms that it was sent."""

    def __init__(self) -> None:
        self._app = oidc_provider_mock.app(user_claims=PEOPLE)
        self.changes: dict[str, Change] = {}
        self.forms: list[dict[str, list[str]]] = []

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        """WSGI."""
        path = environ["PATH_INFO"]
        if path == "/oauth2/token":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self.forms.append(parse_qs(body.decode()))
            environ["wsgi.input"] = io.BytesIO(body)
        if path not in self.changes:
            return self._app(environ, start)
        begun: list[Any] = []
        text = b"".join(self._app(environ, lambda *args: begun.extend(args)))
        changed = json.dumps(self.changes[path](json.loads(text))).encode()
        start(begun[0], [("Content-Type", "application/json"), ("Content-Length", str(len(changed)))])
        return [changed]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Lying, str]]:
    app = Lying()
    running = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield app, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def provider(server: tuple[Lying, str]) -> Iterator[Lying]:
    app = server[0]
    yield app
    app.changes.clear()
    app.forms.clear()


@pytest.fixture
def settings(server: tuple[Lying, str], tmp_path: Path) -> OidcSettings:
    (tmp_path / "secret").write_text("the client's secret\n")
    path = tmp_path / "oidc.yaml"
    path.write_text(
        f"issuer: {server[1]}\nclient_id: fedsigma\nclient_secret_file: secret\nname: Example University\n"
        "operators: [fl-operators]\nviewers: [fl-viewers]\n"
    )
    return OidcSettings.read(path)


@pytest.fixture
def log() -> FakeLog:
    return FakeLog()


@pytest.fixture
def browser(provider: Lying, settings: OidcSettings, log: FakeLog) -> TestClient:
    accounts = Accounts(None, hasher=QUICK)
    return client(door(accounts, oidc=OidcProvider(settings, origin=ORIGIN), log=log))


def at_the_provider(address: str, person: str) -> str:
    """Agree there, and say where one is sent back to."""
    return str(httpx.post(address, data={"sub": person}).headers["location"])


def way(browser: TestClient, person: str, *, next: str = "/") -> Any:
    """All the way, until the dashboard's answer."""
    there = browser.get("/login/oidc", params={"next": next})
    assert there.status_code == 302
    back = at_the_provider(there.headers["location"], person)
    assert back.startswith(ORIGIN)
    return browser.get(back.removeprefix(ORIGIN))


def refused(browser: TestClient, log: FakeLog, answer: Any) -> str:
    """Nobody got in; the kind of error that was noted."""
    assert answer.status_code == 403
    assert 'role="alert"' in answer.text
    assert COOKIE not in browser.cookies
    assert browser.get("/").status_code == 401
    assert log.lines[-1]["kind"] == "dashboard_refused"
    return str(log.lines[-1].get("reason", ""))


def test_group_determines_the_role(browser: TestClient, log: FakeLog) -> None:
    assert "Sign in with Example University" in browser.get("/login").text
    for sub, name, role in [("7", "Ona", "operator"), ("8", "Vic", "viewer")]:
        answer = way(browser, sub, next="/?page=2")
        assert (answer.status_code, answer.headers["location"]) == (303, "/?page=2")
        assert browser.get("/").json() == {"name": name, "role": role}
        line = {"kind": "dashboard_signed_in", "method": "oidc", "user": name, "subject": sub}
        assert log.lines[-1] == {**line, "address": "testclient"}
        cookie = next(c for c in answer.headers.get_list("set-cookie") if c.startswith(f"{COOKIE}="))
        assert {"SameSite=lax", "Secure", "HttpOnly", "Path=/"} <= {
            part.strip() for part in cookie.split(";")
        }
    assert f"{COOKIE}-oidc" not in browser.cookies


def test_users_without_a_group_are_rejected(browser: TestClient, log: FakeLog) -> None:
    assert refused(browser, log, way(browser, "9")) == ""
    assert log.lines[-1]["user"] == "Eve"
    refused(browser, log, way(browser, "somebody@example.org"))


def test_the_flow_has_state_nonce_and_pkce(browser: TestClient, provider: Lying) -> None:
    there = browser.get("/login/oidc").headers["location"]
    asked = parse_qs(urlsplit(there).query)
    assert asked["response_type"] == ["code"]
    assert asked["redirect_uri"] == [f"{ORIGIN}/login/oidc/back"]
    assert len(asked["state"][0]) >= 20 and len(asked["nonce"][0]) >= 20
    assert asked["code_challenge_method"] == ["S256"]
    browser.get(at_the_provider(there, "7").removeprefix(ORIGIN))
    (form,) = provider.forms
    digest = hashlib.sha256(form["code_verifier"][0].encode()).digest()
    assert asked["code_challenge"] == [base64.urlsafe_b64encode(digest).rstrip(b"=").decode()]


def test_callback_works_once_in_one_browser(browser: TestClient, provider: Lying, log: FakeLog) -> None:
    back = at_the_provider(browser.get("/login/oidc").headers["location"], "7").removeprefix(ORIGIN)
    other = client(browser.app)
    assert refused(other, log, other.get(back)) == "MismatchingStateError"
    assert refused(browser, log, browser.get(back + "x")) == "MismatchingStateError"
    back = at_the_provider(browser.get("/login/oidc").headers["location"], "7").removeprefix(ORIGIN)
    kept = browser.cookies[f"{COOKIE}-oidc"]
    assert browser.get(back).status_code == 303
    browser.cookies.clear()
    browser.cookies.set(f"{COOKIE}-oidc", kept, domain=HOST)
    assert refused(browser, log, browser.get(back)) == "OAuthError"


def test_callback_errors_are_not_displayed(browser: TestClient, log: FakeLog) -> None:
    for query in ("", "?error=access_denied&error_description=Call+0900", "?code=x", "?code=x&state=y"):
        answer = browser.get("/login/oidc/back" + query)
        refused(browser, log, answer)
        assert "0900" not in answer.text + json.dumps(log.lines)


def test_invalid_callbacks_are_rate_limited(browser: TestClient, log: FakeLog) -> None:
    statuses = [browser.get("/login/oidc/back?state=x").status_code for _ in range(40)]
    assert statuses == [403] * 30 + [429] * 10
    assert len(log.lines) == 30
    assert browser.get("/login/oidc").status_code == 429


def signing(
    provider: Lying, change: Change, *, key: Any = None, alg: str = "RS256", known: bool = True
) -> None:
    """Have ID tokens changed and signed anew, by a key that the provider calls its own if `known`."""
    key = key or RSAKey.generate_key(2048, parameters={"kid": "new"})

    def renewed(token: dict[str, Any]) -> Any:
        claims = json.loads(base64.urlsafe_b64decode(token["id_token"].split(".")[1] + "=="))
        claims = {name: value for name, value in change(claims).items() if value is not None}
        return {**token, "id_token": jwt.encode({"alg": alg, "kid": "new"}, claims, key, algorithms=[alg])}

    provider.changes["/oauth2/token"] = renewed
    if known:
        provider.changes["/jwks"] = lambda _: {"keys": [key.as_dict(private=False)]}


def test_resigned_tokens_are_accepted(browser: TestClient, provider: Lying) -> None:
    """Or the next test would show nothing."""
    signing(provider, lambda claims: claims)
    assert way(browser, "7").status_code == 303


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "https://other.example"},
        {"aud": "another-client"},
        {"aud": ["another-client"]},
        {"nonce": "another"},
        {"nonce": None},
        {"exp": 1_000_000_000},
        {"exp": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "a\nb", "preferred_username": "a\nb"},
    ],
)
def test_tokens_with_invalid_claims_are_rejected(
    browser: TestClient, provider: Lying, log: FakeLog, change: dict[str, Any]
) -> None:
    signing(provider, lambda claims: {**claims, **change})
    assert refused(browser, log, way(browser, "7"))


def test_tokens_of_another_signer_are_rejected(browser: TestClient, provider: Lying, log: FakeLog) -> None:
    signing(provider, lambda claims: claims, known=False)
    refused(browser, log, way(browser, "7"))
    # Signed by what both know, or by nobody, and the provider says that it does so.
    provider.changes["/.well-known/openid-configuration"] = lambda told: {
        **told,
        "id_token_signing_alg_values_supported": ["HS256", "none", "RS256"],
    }
    signing(provider, lambda claims: claims, key=OctKey.import_key("the client's secret" * 3), alg="HS256")
    refused(browser, log, way(browser, "7"))
    provider.changes["/oauth2/token"] = unsigned
    refused(browser, log, way(browser, "7"))
    provider.changes["/oauth2/token"] = lambda token: {**token, "id_token": None}
    refused(browser, log, way(browser, "7"))
    provider.changes["/oauth2/token"] = lambda token: {"access_token": "x", "token_type": "Bearer"}
    assert refused(browser, log, way(browser, "7")) == "OidcError"


def unsigned(token: dict[str, Any]) -> dict[str, Any]:
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    return {**token, "id_token": f"{head}.{token['id_token'].split('.')[1]}."}


@pytest.mark.parametrize(
    "told",
    [
        {"issuer": "https://other.example"},
        {"authorization_endpoint": "http://192.0.2.1/authorize"},
        {"token_endpoint": "http://192.0.2.1/token"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"id_token_signing_alg_values_supported": ["none", "HS256"]},
    ],
)
def test_invalid_provider_metadata_are_rejected(
    browser: TestClient, provider: Lying, log: FakeLog, told: dict[str, Any]
) -> None:
    provider.changes["/.well-known/openid-configuration"] = lambda known: {**known, **told}
    assert refused(browser, log, browser.get("/login/oidc")) in ("OidcError", "ConfigError")


def test_unreachable_provider_is_reported(settings: OidcSettings, log: FakeLog, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    away = OidcSettings(
        issuer="http://127.0.0.1:9",
        client_id="x",
        client_secret_file=str(tmp_path / "secret"),
        viewers=("x",),
    )
    browser = client(door(Accounts(None, hasher=QUICK), oidc=OidcProvider(away, origin=ORIGIN), log=log))
    assert refused(browser, log, browser.get("/login/oidc")) == "ConnectError"


def test_groups_may_come_from_the_userinfo_endpoint(
    browser: TestClient, provider: Lying, log: FakeLog
) -> None:
    signing(provider, lambda claims: {**claims, "groups": None})
    assert way(browser, "8").status_code == 303
    assert browser.get("/").json() == {"name": "Vic", "role": "viewer"}
    browser.cookies.clear()
    provider.changes["/userinfo"] = lambda told: {**told, "sub": "7"}
    assert refused(browser, log, way(browser, "8")) == "OidcError"


# -- settings ------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "issuer": "https://id.example.org",
    "client_id": "x",
    "client_secret_file": "s",
    "viewers": ("a",),
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"issuer": "http://id.example.org"}, "https://"),
        ({"issuer": "http://127.0.0.1.evil.example"}, "https://"),
        ({"issuer": "https://"}, "https://"),
        ({"viewers": ()}, "name at least one group"),
        ({"scopes": ("profile",)}, "lacks 'openid'"),
        ({"client_id": ""}, "client_id"),
    ],
)
def test_invalid_settings(change: dict[str, Any], says: str) -> None:
    OidcSettings(**GOOD)
    with pytest.raises(ConfigError, match=says):
        OidcSettings(**{**GOOD, **change})


def test_missing_secret_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("none", "empty"):
        with pytest.raises(ConfigError, match="client_secret_file"):
            OidcProvider(OidcSettings(**{**GOOD, "client_secret_file": str(tmp_path / name)}), origin=ORIGIN)


@pytest.mark.parametrize(
    ("claims", "role"),
    [
        ({"realm_access": {"roles": ["op"]}}, "operator"),
        ({"realm_access": {"roles": ["vi", "op"]}}, "operator"),
        ({"realm_access": {"roles": "vi"}}, "viewer"),
        ({"realm_access.roles": ["vi"]}, "viewer"),
        ({"realm_access": {"roles": {"op": True}}}, None),
        ({"realm_access": {"roles": [["op"], 1, None]}}, None),
        ({"realm_access": "op"}, None),
        ({"roles": ["op"]}, None),
        ({}, None),
    ],
)
def test_role_is_read_from_the_claim(claims: dict[str, Any], role: str | None) -> None:
    settings = OidcSettings(
        **{**GOOD, "roles_claim": "realm_access.roles", "operators": ("op",), "viewers": ("vi",)}
    )
    assert settings.role(claims) == role


# -- a real server -------------------------------------------------------------------------------------------


@contextmanager
def served(app: ASGIApp, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", proxy_headers=False, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_over_the_network(provider: Lying, settings: OidcSettings) -> None:
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    accounts = Accounts(None, hasher=QUICK)
    app = door(accounts, settings=AccessSettings(origins=(here,)), oidc=OidcProvider(settings, origin=here))
    with served(app, port), httpx.Client(base_url=here) as browser:
        assert browser.get("/health").status_code == 200
        first = browser.get("/?page=2", headers=HTML)
        assert first.headers["location"] == "/login?next=%2F%3Fpage%3D2"
        there = browser.get("/login/oidc?next=%2F%3Fpage%3D2").headers["location"]
        answer = browser.get(at_the_provider(there, "7"))
        assert answer.headers["location"] == "/?page=2"
        assert browser.get("/").json() == {"name": "Ona", "role": "operator"}
        # What uvicorn makes of addresses and bodies, as nobody but a raw socket can send them.
        assert raw(port, "GET /health/%2e%2e/ HTTP/1.1\r\nHost: x\r\n") == 400
        assert raw(port, "GET //health HTTP/1.1\r\nHost: x\r\n") == 400
        assert raw(port, f"GET http://127.0.0.1:{port}/act HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n") in (
            400,
            401,
        )
        head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {here}\r\n"
        assert raw(port, head + "Content-Length: 99999999\r\n") == 413
        chunk = "10000\r\n" + "x" * 65536 + "\r\n"
        assert raw(port, head + "Transfer-Encoding: chunked\r\n", chunk * 2) == 413


def raw(port: int, head: str, body: str = "") -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall((head + "Connection: close\r\n\r\n" + body).encode())
        return int(connection.recv(4096).split(b" ")[1])
