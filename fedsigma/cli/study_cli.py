"""The commands of studies at a centre; added to the group `study`, beside those of a simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsigma.common.utils.console import FAILED
from fedsigma.common.utils.printing import print_table

if TYPE_CHECKING:
    from fedsigma.server.deployment.studies import Studies, Submitted

__all__ = ["Tracker", "add_commands"]


Folder = Annotated[
    Path, typer.Option("--folder", "-f", envvar="FEDSIGMA_CENTRE", help="The centre's folder.")
]
Tracker = Annotated[
    list[str] | None,
    typer.Option(help="mlflow, tensorboard or wandb; mlflow+sigma: with the sigma file. Repeatable."),
]
Run = Annotated[str, typer.Argument(help="A run's number, or a study's name for its latest run.")]


def add_commands(study_app: typer.Typer) -> None:
    """Add submit, status, stop, resume and logs to the group `study`."""
    for command in (submit, status, stop, resume, logs):
        study_app.command()(command)


def submit(
    study: Annotated[str, typer.Argument(help="A study that comes with FedSigma, or a study file.")],
    folder: Folder,
    again: Annotated[bool, typer.Option(help="Also if the same study was submitted before.")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds; 0: as the study says.")] = 0,
    seed: Annotated[int, typer.Option(min=-1, help="Seed; -1: as the study says.")] = -1,
    tracker: Tracker = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end, and exit by it.")] = False,
) -> None:
    """Check a study and hand it to the centre's sites.

    Exit code 0: submitted, or with --wait completed; 1: with --wait, it ended otherwise; 3: the study does
    not do, or was submitted before, or the centre does not run.
    """
    studies = _studies(folder)
    made = studies.submit(study, again=again, rounds=rounds, seed=seed, trackers=",".join(tracker or ()))
    typer.echo(f"Submitted '{made.study}' as run {made.run_id}; its folder is {made.folder}.")
    if wait:
        _wait(studies, made.run_id)


def wait_for_run(folder: Path, study: str) -> None:
    """Submit a study, even if it was submitted before, and wait for its end; exits as `submit --wait`."""
    studies = _studies(folder)
    made = studies.submit(study, again=True)
    _wait(studies, made.run_id)
    typer.echo(f"Report: {Path(made.folder) / 'report.html'}")


def status(
    folder: Folder,
    run: Annotated[str | None, typer.Argument(help="A run's number or a study's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what was submitted, and how it is.

    Exit code 0; for a single RUN, 1 if it ended without being completed.
    """
    studies = _studies(folder)
    found = [studies.find(run)] if run else studies.submitted()
    rows = [
        {
            "run": one.submission.run_id,
            "study": one.submission.study,
            "status": one.status,
            "rounds": one.rounds,
            "submitted": one.submission.submitted_at.isoformat(),
            "folder": one.submission.folder,
        }
        for one in found
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(("run", "study", "status", "rounds", "submitted"), rows)
    if run and _ended_badly(found[0]):
        raise typer.Exit(FAILED)


def stop(run: Run, folder: Folder) -> None:
    """Stop a run; what it has done stays, and `resume` goes on with it."""
    made = _studies(folder).stop(run)
    typer.echo(
        f"Run {made.run_id} of '{made.study}' is stopped; to go on: fedsigma study resume {made.run_id}"
    )


def resume(
    run: Run,
    folder: Folder,
    wait: Annotated[bool, typer.Option(help="Wait for the end, and exit by it.")] = False,
) -> None:
    """Go on with a run that ended before its last round.

    Exit codes as of `submit`.
    """
    studies = _studies(folder)
    made = studies.resume(run)
    typer.echo(f"Run {made.resumes} goes on as run {made.run_id}.")
    if wait:
        _wait(studies, made.run_id)


def logs(
    run: Run,
    folder: Folder,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing until the run ends.")] = False,
) -> None:
    """Print the log of a run at the centre. Sites' logs stay at the sites."""
    raise typer.Exit(_studies(folder).logs(run, follow=follow))


def _studies(folder: Path) -> Studies:
    from fedsigma.server.deployment.home import CentreFolder
    from fedsigma.server.deployment.studies import Studies

    return Studies(CentreFolder(folder))


def _wait(studies: Studies, run: str) -> None:
    last = None
    for last in studies.watch(run):
        typer.echo(f"{last.status}, round {last.rounds}")
    if last is None or _ended_badly(last):
        raise typer.Exit(FAILED)


def _ended_badly(one: Submitted) -> bool:
    return not one.open and one.status != "finished:completed"
