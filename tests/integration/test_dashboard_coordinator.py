"""A server's pages without its processes: what waits or did not begin, who was heard of, who may act."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedsigma.common.ops.supervisor import free_ports
from fedsigma.server.dashboard.app import SERVER_PAGES
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.middleware import require_login
from fedsigma.server.dashboard.config import DashboardConfig
from fedsigma.server.dashboard.pages.coordinator import coordinator_routes
from fedsigma.server.dashboard.pages.routes import DashboardContext, make_app
from fedsigma.server.dashboard.pages.run_index import RunIndex
from fedsigma.server.dashboard.pages.superlink_watch import SuperLinkWatch
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.database import NodeKey, ServerDatabase, Site, Submission
from fedsigma.server.deployment.flower_control import Node
from fedsigma.server.deployment.home import ServerConfig, ServerHome
from tests.helpers.dashboard_door import ACCESS, FROM_US, HTML, PASSWORD, QUICK, client, sign_in
from tests.helpers.synthetic_run import write_synthetic_run

NOON = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


class Told:
    """Stands for the server's Control, which asks a SuperLink; here nobody is there to be asked."""

    def nodes(self) -> dict[str, Node]:
        return {"7": Node("7", "online", "2026-03-01T11:00:00+00:00")}

    def runs(self) -> dict[str, str]:
        return {"1": "pending", "2": "finished:failed"}


@pytest.fixture
def server(tmp_path: Path) -> ServerHome:
    ports = free_ports(4)
    config = ServerConfig(
        name="Tests", address=f"127.0.0.1:{ports[0]}", superlink=f"127.0.0.1:{ports[1]}", proxy="none"
    )
    found = ServerHome.create(tmp_path / "server", config, own=None)
    registry = ServerDatabase(found.path)
    with registry.session() as session:
        session.add(Site(name="north", invited_at=NOON))
        session.add(Site(name="annex", invited_at=NOON, note="<i>new</i>"))
        session.flush()
        session.add(NodeKey(node_id="7", site="north", public_key="k", added_at=NOON))
        for number, name in enumerate(("waits", "died", "ran"), start=1):
            session.add(
                Submission(
                    run_id=str(number),
                    study=name,
                    digest="0" * 64,
                    folder=str(found.path / "runs" / name),
                    submitted_at=NOON + datetime.timedelta(minutes=number),
                )
            )
    run = write_synthetic_run(found.path / "runs" / "ran", name="ran", rounds=2, finished=1, troubles=False)
    run.log_event("site_ready", site="north", version="9.9.9")
    return found


@pytest.fixture
def watch(server: ServerHome) -> SuperLinkWatch:
    found = SuperLinkWatch(server, control=Told())  # type: ignore[arg-type]
    found.nodes, found.runs, found.error = Told().nodes(), Told().runs(), ""
    return found


@pytest.fixture
def browsers(server: ServerHome, watch: SuperLinkWatch) -> dict[str, TestClient]:
    """Two people who are signed in, and one who is not."""
    accounts = Accounts(None, hasher=QUICK)
    desk = DashboardContext(RunIndex(server.path / "runs", server=server, watch=watch), SERVER_PAGES)
    pages = make_app(desk, coordinator_routes(desk, server, watch))
    app = require_login(pages, accounts=accounts, settings=ACCESS, log=ServerAuditLog(server.path))
    found = {"nobody": client(app)}
    for name, role in (("olga", "operator"), ("vera", "viewer")):
        accounts.add_user(name, role=role, password=PASSWORD)
        found[name] = client(app)
        sign_in(found[name], name)
    return found


def page(browser: TestClient, path: str) -> str:
    answer = browser.get(path, headers=HTML)
    assert answer.status_code == 200, answer.text
    return answer.text


def send(browser: TestClient, path: str, **fields: str) -> Any:
    csrf = re.search(r'name="csrf" value="([^"]+)"', page(browser, "/"))
    assert csrf
    return browser.post(path, data={"csrf": csrf[1], **fields}, headers={**FROM_US, **HTML})


def states(text: str) -> dict[str, str]:
    rows = re.findall(r"<tr data-words.*?</tr>", text, re.DOTALL)
    return {
        re.search(r"<small>(.*?)</small>", row)[1]: re.search(r'class="state (\w+)"', row)[1]  # type: ignore[index]
        for row in rows
    }


def test_submitted_studies_are_listed(browsers: dict[str, TestClient]) -> None:
    text = page(browsers["vera"], "/")
    assert states(text) == {"ran": "interrupted", "died": "failed", "waits": "queued"}
    assert "the run did not start: finished:failed" in text
    assert 'href="/runs/ran"' in text and 'href="/runs/waits"' not in text
    assert "/stop/waits" not in text and "/stop/waits" in page(browsers["olga"], "/")


def test_a_run_stays_listed_while_it_starts(browsers: dict[str, TestClient], server: ServerHome) -> None:
    assert states(page(browsers["vera"], "/"))["waits"] == "queued"  # the folders are listed now
    folder = server.path / "runs" / "waits"
    folder.mkdir()
    assert states(page(browsers["vera"], "/"))["waits"] == "queued"
    write_synthetic_run(folder, name="waits", rounds=2, finished=1, troubles=False)
    text = page(browsers["vera"], "/")
    assert states(text)["waits"] == "interrupted"  # no process holds its lock
    assert 'href="/runs/waits"' in text
    page(browsers["vera"], "/runs/waits")


def test_studies_are_queued_while_the_superlink_is_unreachable(
    browsers: dict[str, TestClient], watch: SuperLinkWatch
) -> None:
    watch.error = "it does not answer"
    assert states(page(browsers["vera"], "/"))["died"] == "queued"
    assert "is not known: it does not answer" in page(browsers["vera"], "/sites")


def test_sites_are_listed_with_contact_and_version(browsers: dict[str, TestClient]) -> None:
    text = page(browsers["vera"], "/sites")
    rows = {row[0]: row[1:] for row in re.findall(r"<tr>" + r"<t[hd][^>]*>(.*?)</t[hd]>" * 6 + "</tr>", text)}
    state, node, contact, version, _ = rows["north"]
    assert (state, node, version) == ("joined", "online", "9.9.9")
    # It was heard of by the run just now, long after the SuperLink saw its node.
    assert contact > "2026-03-01 11:00"
    assert rows["annex"][:2] == ("invited", "–") and rows["annex"][4] == "&lt;i&gt;new&lt;/i&gt;"


def test_actions_need_an_operator_and_a_csrf_token(browsers: dict[str, TestClient]) -> None:
    for path in ("/stop/ran", "/resume/ran", "/start"):
        assert send(browsers["vera"], path).status_code == 403
        assert browsers["nobody"].post(path, headers=FROM_US).status_code == 401
        assert browsers["olga"].post(path, headers=FROM_US).status_code == 403  # without the word
    assert browsers["vera"].get("/start", headers=HTML).status_code == 403
    assert "Start a study" in page(browsers["olga"], "/start")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "no study was given"),
        ({"bundled": "nothing"}, "no study &#39;nothing&#39; is included in FedSigma"),
        ({"text": "rounds: ["}, "cannot be read"),
        ({"bundled": "demo", "rounds": "many"}, "expected a whole number"),
        ({"bundled": "demo"}, "does not answer: is `fedsigma server up` running?"),
    ],
)
def test_invalid_studies_are_reported_in_the_form(
    browsers: dict[str, TestClient], fields: dict[str, str], told: str
) -> None:
    answer = send(
        browsers["olga"], "/start", **({"rounds": "0", "seed": "-1", "text": "", "bundled": ""} | fields)
    )
    assert answer.status_code == 400 and told in answer.text
    for value in fields.values():
        assert value in answer.text
    assert str(Path.home()) not in answer.text


def test_unknown_run_cannot_be_stopped(browsers: dict[str, TestClient]) -> None:
    assert send(browsers["olga"], "/stop/nowhere").status_code == 404


def test_the_audit_log_is_verified_and_shown(browsers: dict[str, TestClient], server: ServerHome) -> None:
    text = page(browsers["vera"], "/audit")
    assert "no line was changed or removed" in text and "dashboard signed in" in text
    file = server.path / "audit.jsonl"
    file.write_text(file.read_text().replace("vera", "anna"))
    text = page(browsers["vera"], "/audit")
    assert "Verification of the audit log failed" in text and "no line was changed" not in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("listen: here", "expected HOST:PORT"),
        ("certificate: a.pem", "belong together"),
        ("access: {origins: ['http://fl.example.org']}", "expected https"),
        ("access: {origins: ['https://fl.example.org']}", "neither certificate nor access.proxies"),
        ("lisen: 127.0.0.1:1", "did you mean 'listen'"),
    ],
)
def test_invalid_dashboard_settings_are_reported(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "dashboard.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=re.escape(told)):
        DashboardConfig.read(tmp_path)


def test_paths_in_settings_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "certificate: a.pem\nkey: /b/key.pem\naccess: {origins: ['https://fl.example.org']}\n"
    (tmp_path / "dashboard.yaml").write_text(text)
    found = DashboardConfig.read(tmp_path)
    assert (found.certificate, found.key) == (str(tmp_path / "a.pem"), "/b/key.pem")
