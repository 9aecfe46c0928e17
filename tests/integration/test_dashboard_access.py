"""Who gets in to the dashboard: signing in and out, forged requests, roles, tokens, links."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from starlette.testclient import TestClient

from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.login import OneTimeLink
from fedsigma.server.dashboard.auth.settings import AccessSettings
from tests.helpers.dashboard_door import (
    FROM_US,
    HOST,
    HTML,
    ORIGIN,
    PASSWORD,
    QUICK,
    FakeLog,
    client,
    csrf,
    door,
    sign_in,
)


def test_only_health_is_reachable_without_signing_in(visitor: TestClient) -> None:
    assert visitor.get("/health").text == "well"
    assert visitor.head("/health").status_code == 200
    for path in ("/", "/act", "/static/app.js?v=1", "/there/is/none", "/login/other", "/logout", "/health/"):
        answer = visitor.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Cookie")
        assert "anna" not in answer.text
        page = visitor.get(path, headers=HTML)
        assert page.status_code == 303
        assert page.headers["location"].partition("?")[0] == "/login"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GETX"):
        assert visitor.request(method, "/act", headers={**HTML, **FROM_US}).status_code == 401
    assert visitor.post("/health", headers=FROM_US).status_code == 401


def test_login_redirects_to_the_requested_page(visitor: TestClient) -> None:
    answer = visitor.get("/runs/demo?tab=sites&page=2", headers=HTML)
    place = parse_qs(urlsplit(answer.headers["location"]).query)["next"]
    assert place == ["/runs/demo?tab=sites&page=2"]
    page = visitor.get(answer.headers["location"])
    assert 'value="/runs/demo?tab=sites&amp;page=2"' in page.text
    assert sign_in(visitor, "anna", next=place[0]).headers["location"] == place[0]


def test_session_identifies_the_user(anna: TestClient) -> None:
    assert anna.get("/").json() == {"name": "anna", "role": "operator"}
    answer = anna.get("/login?next=/runs")
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs")


def test_session_cookie_has_protective_attributes(visitor: TestClient) -> None:
    cookie = sign_in(visitor, "anna").headers["set-cookie"]
    name, _, rest = cookie.partition("=")
    assert name == "__Host-fedsigma"
    parts = {part.strip().lower() for part in rest.split(";")[1:]}
    assert parts == {"httponly", "path=/", "samesite=strict", "secure"}


def test_login_prevents_session_fixation(visitor: TestClient, accounts: Accounts) -> None:
    planted = "p" * 43
    visitor.cookies.set("__Host-fedsigma", planted, domain=HOST)
    sign_in(visitor, "anna")
    got = visitor.cookies["__Host-fedsigma"]
    assert got != planted
    assert accounts.find_user(planted) is None
    # Nor does one that was good before stay so.
    sign_in(visitor, "vera")
    assert accounts.find_user(got) is None
    assert visitor.get("/").json()["name"] == "vera"


def test_logout_ends_the_session(anna: TestClient, accounts: Accounts, log: FakeLog) -> None:
    token = anna.cookies["__Host-fedsigma"]
    assert anna.get("/logout").status_code == 405
    assert anna.post("/logout", headers=FROM_US).status_code == 403
    assert accounts.find_user(token) is not None
    answer = anna.post("/logout", headers=FROM_US, data={"csrf": csrf(anna)})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "__Host-fedsigma" not in anna.cookies
    assert accounts.find_user(token) is None
    anna.cookies.set("__Host-fedsigma", token)
    assert anna.get("/").status_code == 401
    assert log.lines[-1] == {"kind": "dashboard_signed_out", "user": "anna"}


def test_a_wrong_password_and_a_wrong_name_look_the_same(visitor: TestClient) -> None:
    answers = [sign_in(visitor, name, "not the password", check=False) for name in ("anna", "nobody")]
    assert [a.status_code for a in answers] == [401, 401]
    assert answers[0].text.replace("anna", "nobody") == answers[1].text
    assert 'role="alert"' in answers[0].text
    assert "set-cookie" not in answers[0].headers
    assert "not the password" not in answers[0].text


def test_entered_name_is_escaped(visitor: TestClient) -> None:
    answer = sign_in(visitor, '"><script>alert(1)</script>', "not the password", check=False)
    assert "<script" not in answer.text


def test_invalid_forms_are_rejected(visitor: TestClient) -> None:
    for data in ({}, {"name": "anna"}, {"password": PASSWORD}, {"name": ["anna", "vera"], "password": ""}):
        assert visitor.post("/login", headers=FROM_US, data=data).status_code == 401
    files = {"name": ("x", b"anna"), "password": ("y", PASSWORD.encode())}
    assert visitor.post("/login", headers=FROM_US, files=files).status_code == 400
    strange = {"name": "anna\x00", "password": "\udcff\x00"}
    body = "&".join(f"{key}={quote(value, errors='surrogatepass')}" for key, value in strange.items())
    form = {**FROM_US, "Content-Type": "application/x-www-form-urlencoded"}
    assert visitor.post("/login", headers=form, content=body).status_code == 401


def test_login_page_is_accessible(visitor: TestClient) -> None:
    page = visitor.get("/login").text
    for name, complete in (("name", "username"), ("password", "current-password")):
        field = re.search(rf'<input id="{name}"[^>]*>', page)
        assert field is not None
        assert f'<label for="{name}">' in page
        assert f'autocomplete="{complete}"' in field[0]
    assert '<html lang="en">' in page
    assert "prefers-color-scheme: dark" in page
    assert "<script" not in page
    assert page.count("autofocus") == 1


def test_changes_need_a_csrf_token(anna: TestClient) -> None:
    word = csrf(anna)
    refused: list[dict[str, Any]] = [
        {},
        {"data": {"csrf": ""}},
        {"data": {"csrf": word[:-1]}},
        {"data": {"csrf": "é"}},
        {"files": {"csrf": ("csrf", word.encode())}},
        {"headers": {"X-CSRF-Token": ""}, "data": {"csrf": word}},
        {"headers": {"X-CSRF-Token": "no"}},
        {"json": {"csrf": word}},
        {"params": {"csrf": word}},
    ]
    for sent in refused:
        sent["headers"] = {**FROM_US, **sent.get("headers", {})}
        assert anna.post("/act", **sent).status_code == 403, sent
    assert anna.post("/act", headers=FROM_US, data={"csrf": word, "study": "demo"}).json() == {
        "study": "demo"
    }
    parts = {"csrf": (None, word), "study": (None, "demo")}
    assert anna.post("/act", headers=FROM_US, files=parts).json() == {"study": "demo"}
    assert anna.post("/act", headers={"X-CSRF-Token": word}, data={"study": "x"}).json() == {"study": "x"}


def test_csrf_token_is_valid_for_one_session(anna: TestClient) -> None:
    word = csrf(anna)
    sign_in(anna, "anna")
    assert anna.post("/act", headers=FROM_US, data={"csrf": word}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ORIGIN.replace("https", "http")},
        {"Origin": ORIGIN + ".evil.example"},
        {"Origin": ORIGIN + ":8443"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN},
    ],
)
def test_cross_site_changes_are_rejected_despite_the_csrf_token(
    anna: TestClient, headers: dict[str, str]
) -> None:
    assert anna.post("/act", headers=headers, data={"csrf": csrf(anna)}).status_code == 403
    before = anna.cookies["__Host-fedsigma"]
    answer = anna.post("/login", headers=headers, data={"name": "vera", "password": PASSWORD})
    assert answer.status_code == 403
    assert anna.cookies["__Host-fedsigma"] == before


def test_login_needs_an_origin(visitor: TestClient) -> None:
    assert visitor.post("/login", data={"name": "anna", "password": PASSWORD}).status_code == 403
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": "null", "Sec-Fetch-Site": "same-origin"}):
        answer = visitor.post("/login", headers=headers, data={"name": "anna", "password": PASSWORD})
        assert answer.status_code == 303


def test_another_method_cannot_be_smuggled_in(anna: TestClient) -> None:
    smuggled = {"X-HTTP-Method-Override": "POST", "X-HTTP-Method": "POST", "X-Method-Override": "POST"}
    assert anna.get("/act?_method=POST", headers=smuggled).status_code == 405
    smuggled = dict.fromkeys(smuggled, "GET")
    assert anna.post("/act", headers={**smuggled, **FROM_US}, data={"_method": "GET"}).status_code == 403


def test_only_operators_may_change_things(visitor: TestClient, accounts: Accounts) -> None:
    sign_in(visitor, "vera")
    assert visitor.get("/").json()["role"] == "viewer"
    for path in ("/act", "/act-later"):
        assert visitor.post(path, headers=FROM_US, data={"csrf": csrf(visitor)}).status_code == 403
    sign_in(visitor, "anna")
    for path in ("/act", "/act-later"):
        assert visitor.post(path, headers=FROM_US, data={"csrf": csrf(visitor)}).status_code == 200


def test_token_only_gives_access_to_the_metrics(visitor: TestClient, accounts: Accounts) -> None:
    bearer = {"Authorization": f"Bearer {accounts.add_token('prometheus')}"}
    assert visitor.get("/metrics", headers=bearer).text == "fedsigma_up 1"
    # It is asked for by an address, not by the dashboard's name.
    assert visitor.get("/metrics", headers={**bearer, "Host": "10.1.2.3:8050"}).status_code == 200
    assert visitor.get("/health", headers={"Host": "10.1.2.3:8050"}).status_code == 200
    for path in ("/", "/metrics/", "/act"):
        assert visitor.get(path, headers=bearer).status_code == 401
    assert visitor.post("/metrics", headers={**bearer, **FROM_US}).status_code == 401
    for wrong in ("", "Bearer", "Bearer ", "Bearer x", "Basic " + bearer["Authorization"][7:]):
        answer = visitor.get("/metrics", headers={"Authorization": wrong})
        assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
    sign_in(visitor, "anna")
    assert visitor.get("/metrics").status_code == 401
    accounts.remove("prometheus")
    assert visitor.get("/metrics", headers=bearer).status_code == 401


def test_sessions_and_tokens_are_not_interchangeable(visitor: TestClient, accounts: Accounts) -> None:
    session, program = accounts.open_session("anna"), accounts.add_token("prometheus")
    assert visitor.get("/metrics", headers={"Authorization": f"Bearer {session}"}).status_code == 401
    visitor.cookies.set("__Host-fedsigma", program)
    assert visitor.get("/").status_code == 401


def test_one_time_link_signs_in_one_browser() -> None:
    link, here = OneTimeLink(), "http://127.0.0.1:8050"
    accounts = Accounts(None, hasher=QUICK)
    settings = AccessSettings(origins=(here, "http://localhost:8050"))
    app = door(accounts, settings=settings, link=link)
    first, second = client(app, here), client(app, here)
    assert 'name="password"' not in first.get("/login").text
    assert first.head(f"/login?token={link.token}").status_code == 200
    assert first.get("/login?token=wrong").status_code == 403
    answer = first.get(f"/login?token={link.token}&next=//evil.example")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert answer.headers["set-cookie"].startswith("fedsigma-8050=")
    assert "strict-transport-security" not in answer.headers
    assert first.get("/").json() == {"name": "local", "role": "viewer"}
    assert second.get(f"/login?token={link.token}").status_code == 403
    assert second.get("/").status_code == 401
    form = {"name": "local", "password": PASSWORD}
    assert second.post("/login", headers={"Origin": here}, data=form).status_code == 403
    # A page of another site that gave its name this machine's address.
    assert client(app, "http://evil.example:8050").get("/login").status_code == 421
