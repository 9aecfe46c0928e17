"""The commands `fedsigma dashboard` and `fedsigma users`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsigma.common.config.schema import ConfigError, split_address
from fedsigma.common.utils.console import print_table
from fedsigma.server.dashboard.auth.passwords import METRICS, ROLES, VIEWER, AccountsError
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.home import ServerHome
from fedsigma.server.runs.run_dir import RunDirError

if TYPE_CHECKING:
    from fedsigma.server.dashboard.auth.accounts import Accounts

__all__ = ["app"]

LISTEN = "127.0.0.1:8050"

app = typer.Typer(no_args_is_help=True)
users_app = typer.Typer(no_args_is_help=True, help="Manage the users of a server's dashboard.")
app.add_typer(users_app, name="users")


@app.command()
def dashboard(
    folder: Annotated[
        Path, typer.Argument(help="Folder that contains run folders, one run folder, or a server's folder.")
    ],
    listen: Annotated[
        str,
        typer.Option(
            help="HOST:PORT, for a folder of runs; a server's address is in its dashboard.yaml.",
            show_default=LISTEN,
        ),
    ] = "",
) -> None:
    """Serve a web page of runs and their progress, until Ctrl-C.

    For a folder of runs it prints a link that signs in one browser, once. For a server it is open to the
    accounts of `fedsigma users`; operators can start, stop and resume studies. Studies run without it.

    Exit code 3: no runs found, or dashboard.yaml is invalid.

    Example: fedsigma dashboard runs
    """
    from fedsigma.server.dashboard.config import FILE, DashboardConfig, check_installed

    check_installed()
    from fedsigma.server.dashboard.app import serve, server_app

    folder = folder.expanduser().resolve()
    if not (folder / "server.yaml").is_file():
        _serve_runs(folder, listen or LISTEN)
        return
    if listen:
        raise ConfigError(f"{folder} is a server: set `listen: {listen}` in {folder / FILE} instead")
    config = DashboardConfig.read(folder)
    text = f"Dashboard: {config.access.origins[0]} (users: fedsigma users list -f {folder})"
    certificate, key = (Path(name) if name else None for name in (config.certificate, config.key))
    web_app = server_app(ServerHome(folder), config)
    serve(web_app, listen=config.listen, certificate=certificate, key=key, announce=lambda: typer.echo(text))


def _serve_runs(folder: Path, listen: str) -> None:
    from fedsigma.server.dashboard.app import runs_app, serve
    from fedsigma.server.dashboard.auth.login import OneTimeLink
    from fedsigma.server.dashboard.auth.settings import AccessSettings
    from fedsigma.server.dashboard.auth.urls import HERE

    if not folder.is_dir():
        raise RunDirError(f"{folder} is not a folder: name the one that contains the run folders")
    host, port = split_address(listen, where="--listen")
    if host not in HERE:
        raise ConfigError(
            f"--listen is {listen}: the dashboard of a folder only listens on this machine, 127.0.0.1:PORT;"
            " over a network use an SSH tunnel, or a server's dashboard"
        )
    link = OneTimeLink()
    origins = (f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    text = (
        f"Dashboard: {origins[0]}/login?token={link.token}\n"
        "The link signs in one browser, once. Press Ctrl-C to stop."
    )
    web_app = runs_app(folder, settings=AccessSettings(origins=origins), link=link)
    serve(web_app, listen=listen, announce=lambda: typer.echo(text))


Folder = Annotated[
    Path, typer.Option("--folder", "-f", envvar="FEDSIGMA_SERVER", help="Folder of the server.")
]
Name = Annotated[
    str, typer.Argument(help="Name of the user: lower-case letters, digits, '.', '_', '@', '-'.")
]
FromStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input, one line.")
]
ROLE_HELP = f"{' (read only) or '.join(ROLES)} (may start, stop and resume studies)."


@users_app.command()
def add(
    name: Name,
    folder: Folder,
    role: Annotated[str, typer.Option(help=ROLE_HELP)] = VIEWER,
    from_stdin: FromStdin = False,
) -> None:
    """Add a user; the password is asked for twice, or read from standard input.

    Exit code 3: the name is taken, or the name, role or password is invalid.
    """
    accounts, log = _open(folder)
    accounts.add_user(name, role=role, password=_read_password(from_stdin))
    log.record("user_added", user=name, role=role)
    typer.echo(f"User '{name}' may sign in as {role}.")


@users_app.command()
def password(name: Name, folder: Folder, from_stdin: FromStdin = False) -> None:
    """Set a user's password and end the user's sessions.

    Exit code 3: there is no such user, or the password is invalid.
    """
    accounts, log = _open(folder)
    accounts.update_user(name, password=_read_password(from_stdin))
    log.record("user_changed", user=name, changed=["password"])
    typer.echo(f"User '{name}' has a new password, and was signed out everywhere.")


@users_app.command()
def change(
    name: Name,
    folder: Folder,
    role: Annotated[str | None, typer.Option(help=ROLE_HELP)] = None,
    disable: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Whether the user may not sign in.")
    ] = None,
) -> None:
    """Change a user's role, or disable or enable a user; ends the user's sessions.

    Exit code 3: there is no such user or role, or no option was given.
    """
    changes = {"role": role, "disabled": disable}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        raise AccountsError("nothing to change: give --role, --disable or --enable")
    accounts, log = _open(folder)
    accounts.update_user(name, role=role, disabled=disable)
    log.record("user_changed", user=name, **changes)
    typer.echo(f"User '{name}' was changed, and was signed out everywhere.")


@users_app.command()
def remove(name: Name, folder: Folder) -> None:
    """Remove a user and end the user's sessions, or remove a program's token.

    Exit code 3: there is no such user or token.
    """
    accounts, log = _open(folder)
    removed = accounts.remove(name)
    log.record("token_removed" if removed.role == METRICS else "user_removed", user=name)
    typer.echo(f"'{name}' was removed.")


@users_app.command(name="list")
def list_users(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List users and tokens."""
    rows = [
        {
            "name": account.name,
            "role": account.role,
            "state": "disabled" if account.disabled else "enabled",
            "created": f"{account.created_at:%Y-%m-%dT%H:%M:%SZ}",
        }
        for account in _open(folder)[0].list_accounts()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        print_table(list(rows[0]), rows)
    else:
        typer.echo("Nobody may sign in yet: fedsigma users add NAME --role operator")


@users_app.command()
def token(
    name: Annotated[str, typer.Argument(help="Name of the program, such as prometheus.")], folder: Folder
) -> None:
    """Create a token with which a program reads /metrics, and print it once.

    Exit code 3: the name is taken or invalid.
    """
    accounts, log = _open(folder)
    created = accounts.add_token(name)
    log.record("token_added", user=name)
    typer.echo(created)
    typer.echo("Store it where the program reads it; it is not shown again.", err=True)


def _open(folder: Path) -> tuple[Accounts, ServerAuditLog]:
    from fedsigma.server.dashboard.config import check_installed

    check_installed()
    from fedsigma.server.dashboard.auth.accounts import Accounts

    server = ServerHome(folder)
    return Accounts(server.path / "dashboard.db"), ServerAuditLog(server.path)


def _read_password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
