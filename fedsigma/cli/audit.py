"""The command `fedsigma audit`, which verifies the logs of a site or a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsigma.common.utils.errors import PROBLEMS
from fedsigma.common.utils.hash_chain import HashChainedLog, Head, LogTampered

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Verify the integrity of an audit log.")


@app.command()
def verify(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="The log: audit.jsonl or privacy.jsonl.")],
    head: Annotated[
        str | None, typer.Option(help="LINES:SHA256, a head that an earlier call printed.")
    ] = None,
) -> None:
    """Verify the integrity of an audit log.

    Finds any line that was changed or removed, and prints the log's head, to be noted elsewhere. Each line
    holds the digest of the previous line; LOG.head, beside the log, holds its length and last digest.
    A person with access to both files can write a new log; a head noted elsewhere detects that, too.

    Exit codes: 0 the log is intact, 3 the log is missing or --head is invalid, 4 a line was changed or
    removed.
    """
    if not log.is_file():
        raise FileNotFoundError(f"{log} does not exist")
    try:
        lines, current = HashChainedLog(log).check(Head.parse(head) if head else None)
    except LogTampered as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(PROBLEMS) from None
    typer.echo(f"{len(lines)} lines, none changed or removed. Head: {current}")
