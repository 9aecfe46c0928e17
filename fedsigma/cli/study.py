"""The commands of studies and runs: simulate, submit, watch, stop, resume and report."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsigma.common.config.study import load_study
from fedsigma.common.utils.console import print_table
from fedsigma.common.utils.errors import FAILED
from fedsigma.server.report.formatting import MISSING, format_percent, format_timestamp
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.runs.summary import RunSummary, find_runs, runs_folder, summarize_run

if TYPE_CHECKING:
    from fedsigma.server.deployment.studies import Studies

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List runs and write reports.")
study_app = typer.Typer(no_args_is_help=True, help="Run or check a study.")
app.add_typer(study_app, name="study")

_STATES = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}

StudyArgument = Annotated[str, typer.Argument(help="A built-in study (demo), or the path of a study file.")]
Run = Annotated[str, typer.Argument(help="A run's number, or a study's name for its latest run.")]
Out = Annotated[Path | None, typer.Option(help="The run folder.", show_default="a new one in $FEDSIGMA_RUNS")]
Rounds = Annotated[int, typer.Option(min=0, help="Rounds; 0: those of the study.")]
Seed = Annotated[int, typer.Option(min=-1, help="Seed; -1: that of the study.")]
Tracker = Annotated[
    list[str] | None,
    typer.Option(help="mlflow, tensorboard or wandb; mlflow+sigma: with the sigma file. Repeatable."),
]
Folder = Annotated[
    Path, typer.Option("--folder", "-f", envvar="FEDSIGMA_SERVER", help="The server's folder.")
]
Wait = Annotated[bool, typer.Option(help="Wait for the end; the exit code is the run's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def runs(
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="Directory of the run folders.", show_default="$FEDSIGMA_RUNS, or ~/fedsigma-runs"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs in a directory, the newest last.

    A run is running, finished, failed or interrupted; interrupted runs can be resumed with --resume.
    """
    directory = directory or runs_folder()
    summaries = [summarize_run(RunDir.open(path)) for path in find_runs(directory)]
    summaries.sort(key=lambda run: (run.started or 0.0, run.path))
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in summaries], indent=2))
    elif summaries:
        Console().print(_table(summaries, directory))
    else:
        typer.echo(f"No runs found in {directory}.")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run, finished or not, and print its path."""
    from fedsigma.server.report import write_report

    typer.echo(str(write_report(RunDir.open(run))))


@study_app.command("run")
def study_run(
    study: StudyArgument,
    out: Out = None,
    rounds: Rounds = 0,
    seed: Seed = -1,
    resume: Annotated[bool, typer.Option(help="Resume the interrupted run in --out.")] = False,
    cpus_per_site: Annotated[int, typer.Option(min=1, help="CPU cores for each site.")] = 1,
    tracker: Tracker = None,
) -> None:
    """Simulate a study with all its sites on this machine, then print its results and its report's path.

    Exit code 0: the run completed; 1: it failed; 3: the study cannot be used; 130: interrupted.
    """
    from fedsigma.server.report import summary_table
    from fedsigma.server.simulation.simulate import run_simulation

    config = load_study(study)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = seed if seed >= 0 else config.seed
    folder = (out or runs_folder() / f"{config.name}-{stamp}-s{number}").expanduser().resolve()
    if resume:
        with RunDir.open(folder).lock():  # fails now rather than after Flower has started
            pass
    try:
        code = run_simulation(
            study,
            out=folder,
            rounds=rounds,
            seed=seed,
            resume=resume,
            cpus_per_site=cpus_per_site,
            trackers=",".join(tracker or ()),
        )
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. To resume: the same command with --resume --out {folder}", err=True)
        raise typer.Exit(130) from None
    if code:
        raise typer.Exit(code)
    run = RunDir.open(folder)
    if config.data is not None and config.data.source.startswith("demo"):
        typer.echo("\nThe images of this study are synthetic: drawn by a program, not taken from patients.")
    Console().print(summary_table(run.read_summary()))
    typer.echo(f"Report: {run.report_path}")


@study_app.command("evaluate")
def study_evaluate(
    study: StudyArgument,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="NAME@N, or a path.")],
    out: Out = None,
    server: Annotated[
        Path | None,
        typer.Option(help="Submit it to the sites of the server in this folder, and wait for the end."),
    ] = None,
) -> None:
    """Evaluate versions of models, and the zero-shot model, at every site of a study, without training.

    Exit code 0: done; 1: the run failed; 3: a version is missing or does not match the study.

    Example: fedsigma study evaluate demo demo@1 demo@2
    """
    paths = [str(Path(model).expanduser().resolve()) if Path(model).exists() else model for model in models]
    config = replace(
        load_study(study), evaluate_versions=tuple(paths), baselines=("zero_shot",), personal=None
    )
    with tempfile.TemporaryDirectory(prefix="fedsigma-") as folder:
        file = Path(folder) / "study.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        if server is None:
            study_run(str(file), out=out)
        else:
            studies = _studies(server)
            submission = studies.submit(str(file), again=True)
            _wait(studies, submission.run_id)
            typer.echo(f"Report: {Path(submission.folder) / 'report.html'}")


@study_app.command("check")
def study_check(study: StudyArgument) -> None:
    """Check a study file and its data, and show what would run, without training."""
    from fedsigma.common.data.records import site_table
    from fedsigma.common.data.sources.registry import open_source

    config = load_study(study)
    typer.echo(config.to_yaml())
    if config.data is not None:
        for row in site_table(open_source(config.data.source, **config.data.options).records):
            typer.echo(f"{row.site or '-'}: {row.label}: {row.train} train, {row.test} test")


@study_app.command("schema")
def study_schema() -> None:
    """Print the JSON Schema of a study file, with which editors complete and check it.

    Example: fedsigma study schema > study.schema.json
    """
    from fedsigma.common.config.schema import json_schema
    from fedsigma.common.config.study import StudyConfig

    typer.echo(json.dumps(json_schema(StudyConfig), indent=2))


@study_app.command("privacy")
def study_privacy(
    study: StudyArgument,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Training images of a site.", show_default="shots times classes"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Compute the privacy budget that a private study will use. The fewer images, the more.

    Example: fedsigma study privacy my-study.yaml --images 64

    Exit code 3: the study has no section privacy, or cannot be used.
    """
    from fedsigma.server.federation.privacy_plan import privacy_plan

    config = load_study(study)
    number = images or config.max_examples_per_site
    with Console(stderr=True).status("computing"):
        plan = privacy_plan(config, images=number)
    if as_json:
        typer.echo(json.dumps({"images": number, **asdict(plan)}, indent=2))
        return
    privacy = config.privacy
    whose = "each site" if privacy.of_sites else f"each {privacy.level}, of {number} images at a site"
    typer.echo(
        f"Hides {whose}: noise multiplier {privacy.noise_multiplier:g}, delta {privacy.delta:g};"
        f" a round is {plan.release.steps} steps at a sampling rate of {plan.release.rate:.3g}."
    )
    for rounds, spent in plan.epsilon_after.items():
        typer.echo(f"  after {rounds:>4} rounds  epsilon {spent:8.2f}")
    for target, noise in plan.noise_multiplier_for.items():
        typer.echo(
            f"  all {plan.rounds} rounds within epsilon {target:g} need a noise multiplier of {noise:g}"
        )
    typer.echo(f"The budget, epsilon {privacy.epsilon:g}, allows {plan.within} of {plan.rounds} rounds.")


def _table(summaries: list[RunSummary], directory: Path) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("Run", "Study", "State"):
        table.add_column(head, overflow="fold")
    for head in ("Rounds", "Accuracy"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("Started", no_wrap=True)
    for run in summaries:
        planned = run.rounds_planned if run.rounds_planned is not None else MISSING
        table.add_row(
            escape(str(Path(run.path).relative_to(directory)) if Path(run.path) != directory else run.path),
            escape(run.study),
            f"[{_STATES.get(run.state, 'default')}]{run.state}[/]",
            f"{run.rounds_done}/{planned}",
            format_percent(run.federated_accuracy),
            format_timestamp(run.started),
        )
    return table


@study_app.command()
def submit(
    study: StudyArgument,
    folder: Folder,
    again: Annotated[
        bool, typer.Option(help="Submit it even if the same study was submitted before.")
    ] = False,
    rounds: Rounds = 0,
    seed: Seed = -1,
    tracker: Tracker = None,
    wait: Wait = False,
) -> None:
    """Check a study and submit it to the server's sites.

    Exit code 0: submitted, or with --wait completed; 1: with --wait, it did not complete; 3: the study is
    invalid or was submitted before, or the server is not running.
    """
    studies = _studies(folder)
    submission = studies.submit(
        study, again=again, rounds=rounds, seed=seed, trackers=",".join(tracker or ())
    )
    typer.echo(
        f"Submitted '{submission.study}' as run {submission.run_id}; its folder is {submission.folder}."
    )
    if wait:
        _wait(studies, submission.run_id)


@study_app.command()
def status(
    folder: Folder,
    run: Annotated[str | None, typer.Argument(help="A run's number or a study's name.")] = None,
    as_json: Json = False,
) -> None:
    """List the submitted studies and the states of their runs.

    Exit code 0; for a single RUN, 1 if it ended without completing.
    """
    studies = _studies(folder)
    statuses = [studies.find(run)] if run else studies.statuses()
    rows = [
        {
            "run": status.submission.run_id,
            "study": status.submission.study,
            "status": status.status,
            "rounds": status.rounds,
            "submitted": status.submission.submitted_at.isoformat(),
            "folder": status.submission.folder,
        }
        for status in statuses
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(("run", "study", "status", "rounds", "submitted"), rows)
    if run and statuses[0].resumable:
        raise typer.Exit(FAILED)


@study_app.command()
def stop(run: Run, folder: Folder) -> None:
    """Stop a run; its results so far are kept, and it can be resumed."""
    submission = _studies(folder).stop(run)
    typer.echo(
        f"Run {submission.run_id} of '{submission.study}' is stopped; to resume it:"
        f" fedsigma study resume {submission.run_id}"
    )


@study_app.command()
def resume(
    run: Run,
    folder: Folder,
    wait: Wait = False,
) -> None:
    """Resume a run that ended before its last round.

    Exit codes: see `submit`.
    """
    studies = _studies(folder)
    submission = studies.resume(run)
    typer.echo(f"Run {submission.resumes} is resumed as run {submission.run_id}.")
    if wait:
        _wait(studies, submission.run_id)


@study_app.command()
def logs(
    run: Run,
    folder: Folder,
    follow: Annotated[bool, typer.Option("--follow", help="Keep printing until the run ends.")] = False,
) -> None:
    """Print the log of a run at the server. Sites' logs stay at the sites."""
    raise typer.Exit(_studies(folder).logs(run, follow=follow))


def _studies(folder: Path) -> Studies:
    from fedsigma.server.deployment.home import ServerHome
    from fedsigma.server.deployment.studies import Studies

    return Studies(ServerHome(folder))


def _wait(studies: Studies, run: str) -> None:
    status = None
    for status in studies.watch(run):
        typer.echo(f"{status.status}, round {status.rounds}")
    if status is None or status.resumable:
        raise typer.Exit(FAILED)
