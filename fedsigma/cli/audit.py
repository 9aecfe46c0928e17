"""The command `fedsigma audit`: whether a log of a site or a server is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.utils.errors import PROBLEMS
from fedsigma.common.utils.hash_chain import HashChainedLog, Head, LogTampered

__all__ = ["app"]


app = typer.Typer(no_args_is_help=True)
audit_app = typer.Typer(no_args_is_help=True, help="Look whether a log was changed.")
app.add_typer(audit_app, name="audit")


@app.callback()
def _group() -> None:
    """Keep `audit` a group of its own."""


Log = Annotated[Path, typer.Argument(metavar="LOG", help="audit.jsonl or privacy.jsonl.")]


@audit_app.command()
def verify(
    log: Log,
    head: Annotated[
        str | None, typer.Option(help="LINES:SHA256 as it was printed and noted elsewhere, at any time.")
    ] = None,
) -> None:
    """Find any line of a log that was changed or removed, and print its head to be noted elsewhere.

    Each line holds the digest of the one before it, and LOG.head beside the log its length and last digest.
    Who can replace both files can write a new log; a head that was noted elsewhere finds that, too.

    Exit code 0: whole; 3: there is no log, or --head is none; 4: something was changed or removed.
    """
    if not log.is_file():
        raise FileNotFoundError(f"{log} is not there")
    try:
        noted = Head.parse(head) if head else None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        lines, now = HashChainedLog(log).check(noted)
    except LogTampered as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(PROBLEMS) from None
    typer.echo(f"{len(lines)} lines, all as they were written. Head: {now}")
