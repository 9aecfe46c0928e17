"""Users of the dashboard, their passwords and sessions, and the commands for them."""

from __future__ import annotations

import json
import sqlite3
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.common.config.schema import ConfigError
from fedsigma.server.dashboard import config as dashboard_config
from fedsigma.server.dashboard.auth.accounts import Accounts
from fedsigma.server.dashboard.auth.passwords import AccountsError, check_password
from fedsigma.server.dashboard.auth.settings import AccessSettings
from fedsigma.server.dashboard.config import check_installed
from fedsigma.server.deployment.home import ServerConfig, ServerHome
from tests.helpers.dashboard_door import (
    ACCESS,
    ORIGIN,
    PASSWORD,
    QUICK,
    Clock,
)


def test_database_is_private_and_has_no_secrets(accounts: Accounts, tmp_path: Path) -> None:
    token, program = accounts.open_session("anna"), accounts.add_token("prometheus")
    user = accounts.find_user(token)
    assert user is not None
    files = sorted(tmp_path.glob("dashboard.db*"))
    assert files
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for secret in (token, program, PASSWORD, user.csrf):
            assert secret.encode() not in file.read_bytes()
    rows = sqlite3.connect(tmp_path / "dashboard.db").execute("SELECT hash FROM users").fetchall()
    assert all(row[0].startswith("$argon2id$") for row in rows)


def test_permissions_of_an_existing_database_are_restricted(tmp_path: Path) -> None:
    (tmp_path / "dashboard.db").touch(mode=0o644)
    Accounts(tmp_path / "dashboard.db", hasher=QUICK).close()
    assert stat.S_IMODE((tmp_path / "dashboard.db").stat().st_mode) == 0o600


NAME = "long.enough.a.name"
SHORT_OR_LONG = ["", "short", "x" * 11, "long " * 26]
GUESSED = ["a" * 20, "abcabcabcabcabc", "abababababab1", "123456789012", "210987654321", NAME, NAME.upper()]


@pytest.mark.parametrize("password", [*SHORT_OR_LONG, *GUESSED, "fedsigmafedsigma"])
def test_weak_passwords_are_rejected(password: str) -> None:
    with pytest.raises(AccountsError):
        check_password(password, name=NAME)


@pytest.mark.parametrize("password", ["tooshort", *GUESSED[:5]])
def test_errors_do_not_contain_the_password(password: str) -> None:
    with pytest.raises(AccountsError) as error:
        check_password(password, name="anna")
    assert password not in str(error.value)


@pytest.mark.parametrize("password", [PASSWORD, "ﾊﾟｽﾜｰﾄﾞは長いほど良い", "x1" * 5 + "yz", "all small letters"])
def test_long_passwords_need_no_character_classes(password: str) -> None:
    check_password(password, name="anna")


@pytest.mark.parametrize("name", ["", "Anna", "-anna", "an na", "anna\n", "a" * 65, "аnna"])
def test_confusable_names_are_rejected(accounts: Accounts, name: str) -> None:
    with pytest.raises(AccountsError, match="expected 1 to 64"):
        accounts.add_user(name, role="viewer", password=PASSWORD)
    with pytest.raises(AccountsError, match="expected 1 to 64"):
        accounts.add_token(name)


def test_passwords_are_unicode_normalized(accounts: Accounts) -> None:
    accounts.add_user("zoe", role="viewer", password="zo\u00eb ist zu lang")
    assert accounts.verify_password("zoe", "zoe\u0308 ist zu lang")
    assert not accounts.verify_password("zoe", "zoe ist zu lang")


def test_unknown_users_take_as_long_to_verify(tmp_path: Path) -> None:
    verified = []

    class Counting(PasswordHasher):
        def verify(self, hash: Any, password: Any) -> Any:
            verified.append(hash)
            return super().verify(hash, password)

    hasher = Counting(time_cost=1, memory_cost=8, parallelism=1)
    accounts = Accounts(tmp_path / "d.db", hasher=hasher)
    accounts.add_user("anna", role="viewer", password=PASSWORD)
    accounts.add_user("gone", role="viewer", password=PASSWORD)
    accounts.update_user("gone", disabled=True)
    for name, expected in [("anna", True), ("nobody", False), ("gone", False)]:
        verified.clear()
        assert accounts.verify_password(name, PASSWORD) is expected
        assert len(verified) == 1
        assert verified[0].startswith("$argon2id$v=19$m=8,t=1,p=1$")
    accounts.close()


def test_outdated_hash_is_replaced_at_login(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    Accounts(path, hasher=QUICK).add_user("anna", role="viewer", password=PASSWORD)
    accounts = Accounts(path, hasher=PasswordHasher(time_cost=2, memory_cost=16, parallelism=1))
    assert not accounts.verify_password("anna", "wrong")
    kept = sqlite3.connect(path).execute("SELECT hash FROM users").fetchone()[0]
    assert ",t=1," in kept
    assert accounts.verify_password("anna", PASSWORD)
    kept = sqlite3.connect(path).execute("SELECT hash FROM users").fetchone()[0]
    assert "m=16,t=2," in kept
    assert accounts.verify_password("anna", PASSWORD)


@pytest.mark.parametrize(
    "change", [{"role": "viewer"}, {"password": "another long one"}, {"disabled": True}, None]
)
def test_changed_and_removed_users_are_signed_out(accounts: Accounts, change: dict[str, Any] | None) -> None:
    mine, other = accounts.open_session("anna"), accounts.open_session("vera")
    elsewhere = accounts.open_session("anna", method="oidc", role="viewer")
    if change is None:
        accounts.remove("anna")
    else:
        accounts.update_user("anna", **change)
    assert accounts.find_user(mine) is None
    assert accounts.find_user(other) is not None
    # Who signed in at a provider under the same name is another person.
    assert accounts.find_user(elsewhere) is not None


def test_new_user_of_a_removed_name_has_no_sessions(accounts: Accounts) -> None:
    token = accounts.open_session("anna")
    accounts.remove("anna")
    accounts.add_user("anna", role="viewer", password=PASSWORD)
    assert accounts.find_user(token) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(dashboard_config, "find_spec", lambda name: None if name == "limits" else object())
    with pytest.raises(AccountsError, match=r"limits is not installed: pip install 'fedsigma\[dashboard\]'"):
        check_installed()


def test_disabled_user_can_be_enabled(accounts: Accounts) -> None:
    accounts.update_user("anna", disabled=True)
    assert not accounts.verify_password("anna", PASSWORD)
    with pytest.raises(AccountsError, match="disabled"):
        accounts.open_session("anna")
    accounts.update_user("anna", disabled=False)
    assert accounts.verify_password("anna", PASSWORD)


def test_sessions_expire(accounts: Accounts, clock: Clock) -> None:
    idle = accounts.open_session("anna")
    clock.now += 30 * 60 - 1
    assert accounts.find_user(idle) is not None
    clock.now += 30 * 60
    assert accounts.find_user(idle) is None
    clock.now -= 30 * 60
    assert accounts.find_user(idle) is None, "what ended came back"
    busy = accounts.open_session("anna")
    for _ in range(12 * 3):
        assert accounts.find_user(busy) is not None
        clock.now += 20 * 60
    assert accounts.find_user(busy) is None


def test_polling_does_not_extend_a_session(accounts: Accounts, clock: Clock) -> None:
    token = accounts.open_session("anna")
    for _ in range(3):
        assert accounts.find_user(token, active=False) is not None
        clock.now += 10 * 60
    assert accounts.find_user(token, active=False) is None


def test_expired_sessions_are_deleted(accounts: Accounts, clock: Clock, tmp_path: Path) -> None:
    for _ in range(3):
        accounts.open_session("anna")
        clock.now += 3600
    accounts.open_session("anna")
    assert sqlite3.connect(tmp_path / "dashboard.db").execute("SELECT count(*) FROM sessions").fetchone() == (
        1,
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_accounts_are_thread_safe(tmp_path: Path, in_memory: bool) -> None:
    accounts = Accounts(None if in_memory else tmp_path / "d.db", hasher=QUICK, idle_timeout=1e-6 + 100)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                token = accounts.open_session("local", method="link", role="viewer")
                assert accounts.find_user(token) is not None
                accounts.end_session(token)
                assert accounts.find_user(token) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    accounts.close()


HERE = "http://127.0.0.1:8050"
BAD_ORIGINS = ["fl.example.org", "http://fl.example.org", "https://fl.example.org/", "https://FL.example.org"]
BAD_ORIGINS += ["https://fl.example.org:443", "http://127.0.0.1:80", "https://me@fl.example.org"]
BAD_ORIGINS += ["ftp://fl.example.org", "https://fl.example.org:99999", "https://", ""]


@pytest.mark.parametrize("origins", [(), *((bad,) for bad in BAD_ORIGINS), ("https://a.org", HERE)])
def test_invalid_origins_are_rejected(origins: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"access\.origins"):
        AccessSettings(origins=origins)


def test_settings_are_validated() -> None:
    for proxy in ("*", "proxy.example.org", "10.0.0.1/8"):
        with pytest.raises(ConfigError, match=r"access\.proxies"):
            AccessSettings(origins=(ORIGIN,), proxies=(proxy,))
    with pytest.raises(ConfigError, match="per_name"):
        AccessSettings(origins=(ORIGIN,), per_name=0)
    assert ACCESS.secure


@pytest.fixture
def server(tmp_path: Path) -> ServerHome:
    config = ServerConfig(name="Server", address="fl.example.org:443")
    return ServerHome.create(tmp_path / "server", config, own=None)


def command(server: ServerHome, *args: str, input: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["users", *args, "-f", str(server.path)], input=input)
    return result.exit_code, result.stdout, result.stderr


def test_users_command(server: ServerHome) -> None:
    assert command(server, "list")[1].startswith("Nobody may sign in yet")
    typed = f"{PASSWORD}\n{PASSWORD}\n"
    assert command(server, "add", "anna", "--role", "operator", input=typed)[0] == 0
    assert command(server, "add", "vera", "--password-stdin", input=f"{PASSWORD}\n")[0] == 0
    code, out, _ = command(server, "token", "prometheus")
    assert code == 0
    token = out.splitlines()[0]
    assert command(server, "password", "vera", "--password-stdin", input="another long one\n")[0] == 0
    assert command(server, "change", "vera", "--disable")[0] == 0
    rows = json.loads(command(server, "list", "--json")[1])
    assert [(row["name"], row["role"], row["state"]) for row in rows] == [
        ("anna", "operator", "enabled"),
        ("prometheus", "metrics", "enabled"),
        ("vera", "viewer", "disabled"),
    ]
    assert "prometheus" in command(server, "list")[1]
    assert command(server, "remove", "vera")[0] == 0
    assert command(server, "remove", "prometheus")[0] == 0
    accounts = Accounts(server.path / "dashboard.db")
    assert accounts.verify_password("anna", PASSWORD)
    assert accounts.find_token(token) is None
    text = (server.path / "audit.jsonl").read_text()
    assert [json.loads(line)["kind"] for line in text.splitlines()] == [
        "user_added",
        "user_added",
        "token_added",
        "user_changed",
        "user_changed",
        "user_removed",
        "token_removed",
    ]
    for secret in (PASSWORD, "another long one", token):
        assert secret not in text


@pytest.mark.parametrize(
    ("args", "typed", "says"),
    [
        (["add", "Anna", "--password-stdin"], PASSWORD, "lower-case letters"),
        (["add", "anna", "--role", "boss", "--password-stdin"], PASSWORD, "viewer or operator"),
        (["add", "anna", "--password-stdin"], "short", "12 to 128"),
        (["password", "nobody", "--password-stdin"], PASSWORD, "no user 'nobody'"),
        (["remove", "nobody"], None, "no user 'nobody'"),
        (["change", "nobody"], None, "nothing to change"),
    ],
)
def test_users_command_reports_errors(
    server: ServerHome, args: list[str], typed: str | None, says: str
) -> None:
    code, _, error = command(server, *args, input=typed)
    assert code == 3
    assert says in error
    assert not (server.path / "audit.jsonl").exists()


def test_names_are_unique(server: ServerHome) -> None:
    assert command(server, "token", "anna")[0] == 0
    code, _, error = command(server, "add", "anna", "--password-stdin", input=PASSWORD)
    assert code == 3
    assert "already exists" in error
