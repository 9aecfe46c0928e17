"""The commands of the coordinating centre: list the runs, write a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsigma.server.overview import Overview, find_runs, overview, runs_folder
from fedsigma.server.report.words import NOTHING, moment, percent
from fedsigma.server.store import RunFolder

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look at the runs of a server.")

_STATES = {"finished": "green", "failed": "red", "unfinished": "yellow"}


@app.command()
def runs(
    directory: Annotated[
        Path | None,
        typer.Argument(help="Where the run folders are.", show_default="$FEDSIGMA_RUNS, or ~/fedsigma-runs"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs in a directory, the newest last.

    A run is finished, failed, or unfinished: still running, or interrupted and ready for resume=true.
    """
    directory = directory or runs_folder()
    found = [overview(RunFolder.open(path)) for path in find_runs(directory)]
    found.sort(key=lambda run: (run.started or 0.0, run.path))
    if as_json:
        typer.echo(json.dumps([run.to_dict() for run in found], indent=2))
    elif found:
        Console().print(_table(found, directory))
    else:
        typer.echo(f"No runs in {directory}.")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run, finished or not, and print where it is."""
    from fedsigma.server.report import write_report

    typer.echo(str(write_report(RunFolder.open(run))))


def _table(found: list[Overview], directory: Path) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("Run", "Study", "State"):
        table.add_column(head, overflow="fold")
    for head in ("Rounds", "Accuracy"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Started", no_wrap=True)
    for run in found:
        planned = run.rounds_planned if run.rounds_planned is not None else NOTHING
        table.add_row(
            escape(str(Path(run.path).relative_to(directory)) if Path(run.path) != directory else run.path),
            escape(run.study),
            f"[{_STATES.get(run.state, 'default')}]{run.state}[/]",
            f"{run.rounds_done}/{planned}",
            percent(run.federated_accuracy),
            moment(run.started),
        )
    return table
