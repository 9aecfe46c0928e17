"""The commands for who may see a server's dashboard: users, and programs that collect its metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsigma.common.utils.console import print_table
from fedsigma.server.dashboard.auth.accounts import METRICS, ROLES, VIEWER, Accounts, AccountsError
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.home import ServerHome

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
users_app = typer.Typer(no_args_is_help=True, help="Say who may see a server's dashboard.")
app.add_typer(users_app, name="users")


@app.callback()
def _group() -> None:
    """Keep `users` a group of its own."""


Folder = Annotated[
    Path,
    typer.Option("--folder", "-f", envvar="FEDSIGMA_SERVER", help="The server's folder."),
]
Name = Annotated[str, typer.Argument(help="The user: small letters, digits, '.', '_', '@', '-'.")]
FromStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input, one line.")
]


@users_app.command()
def add(
    name: Name,
    folder: Folder,
    role: Annotated[str, typer.Option(help=f"{' (looks) or '.join(ROLES)} (acts as well).")] = VIEWER,
    from_stdin: FromStdin = False,
) -> None:
    """Add a user; the password is asked for twice, or read from standard input.

    Exit code 3: the name is taken, or name, role or password do not do.
    """
    accounts, log = _opened(folder)
    accounts.add_user(name, role=role, password=_password(from_stdin))
    log.record("user_added", user=name, role=role)
    typer.echo(f"User '{name}' may sign in as {role}.")


@users_app.command()
def password(name: Name, folder: Folder, from_stdin: FromStdin = False) -> None:
    """Set a user's password and end the user's sessions.

    Exit code 3: there is no such user, or the password does not do.
    """
    accounts, log = _opened(folder)
    accounts.update_user(name, password=_password(from_stdin))
    log.record("user_changed", user=name, changed=["password"])
    typer.echo(f"User '{name}' has a new password, and was signed out everywhere.")


@users_app.command()
def change(
    name: Name,
    folder: Folder,
    role: Annotated[str | None, typer.Option(help=f"{' or '.join(ROLES)}.")] = None,
    disable: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Whether the user is shut out.")
    ] = None,
) -> None:
    """Give a user another role, or shut a user out without forgetting the name; ends the user's sessions.

    Exit code 3: there is no such user or role, or nothing was to be changed.
    """
    if role is None and disable is None:
        raise AccountsError("nothing to change: give --role, --disable or --enable")
    accounts, log = _opened(folder)
    accounts.update_user(name, role=role, disabled=disable)
    changed = {"role": role, "disabled": disable}
    log.record(
        "user_changed", user=name, **{key: value for key, value in changed.items() if value is not None}
    )
    typer.echo(f"User '{name}' was changed, and was signed out everywhere.")


@users_app.command()
def remove(name: Name, folder: Folder) -> None:
    """Remove a user and end the user's sessions; or remove a program's token.

    Exit code 3: there is no such user or token.
    """
    accounts, log = _opened(folder)
    removed = accounts.remove(name)
    log.record("token_removed" if removed.role == METRICS else "user_removed", user=name)
    typer.echo(f"'{name}' gets in no more.")


@users_app.command(name="list")
def list_users(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List users and tokens."""
    accounts, _ = _opened(folder)
    rows = [
        {
            "name": account.name,
            "role": account.role,
            "state": "disabled" if account.disabled else "enabled",
            "made at": f"{account.created_at:%Y-%m-%dT%H:%M:%SZ}",
        }
        for account in accounts.list_accounts()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        print_table(("name", "role", "state", "made at"), rows)
    else:
        typer.echo("Nobody may sign in yet: fedsigma users add NAME --role operator")


@users_app.command()
def token(
    name: Annotated[str, typer.Argument(help="A name for the program, such as prometheus.")], folder: Folder
) -> None:
    """Make a token by which a program reads /metrics, and print it this once.

    Exit code 3: the name is taken or does not do.
    """
    accounts, log = _opened(folder)
    made = accounts.add_token(name)
    log.record("token_added", user=name)
    typer.echo(made)
    typer.echo("Keep it where the program reads it; it is not shown again.", err=True)


def _opened(folder: Path) -> tuple[Accounts, ServerAuditLog]:
    server = ServerHome(folder)
    return Accounts(server.path / "dashboard.db"), ServerAuditLog(server.path)


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
