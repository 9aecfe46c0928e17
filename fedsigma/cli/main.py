"""The command `fedsigma`: the table of its commands, and the reporting of errors."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedsigma.common import __version__
from fedsigma.common.utils.errors import BAD_INPUT, FAILED, FedSigmaError

__all__ = ["main"]

_MODEL, _STUDY = "fedsigma.cli.model", "fedsigma.cli.study"
# Name -> (module, help). The module's `app` has a command or group of this name, or is the group itself.
COMMANDS = {
    "inspect": (_MODEL, "Count the values that a study would train on a backbone."),
    "backbone": (_MODEL, "Prepare a backbone for a machine without internet: fetch, convert."),
    "data": (
        "fedsigma.cli.data",
        "Check images before a study, and fetch published data sets: check, cards, fetch.",
    ),
    "identity": (_MODEL, "Create this site's identity key for secure aggregation."),
    "audit": ("fedsigma.cli.audit", "Verify the integrity of an audit log: verify."),
    "budget": (_MODEL, "Show the privacy budget that studies have spent at a site."),
    "study": (_STUDY, "Simulate a study (run, check, privacy) or run it on a server (submit, status, stop)."),
    "predict": (_MODEL, "Predict images or DICOM files in a folder with a trained model."),
    "serve": ("fedsigma.cli.serve", "Serve predictions of a trained model over HTTP."),
    "calibrate": (_MODEL, "Calibrate a trained model's probabilities on labelled images."),
    "explain": (_MODEL, "Describe in words how a study changed the model."),
    "models": (
        "fedsigma.cli.models",
        "Manage the model registry: list, show, diff, promote, combine, export, verify.",
    ),
    "export": (_MODEL, "Export a trained model as a plain open_clip folder."),
    "site": ("fedsigma.cli.site", "Run a hospital's site: enrol, doctor, up, status, approve, rotate."),
    "server": ("fedsigma.cli.server", "Run a coordinating server: init, up, invite, admit, sites, revoke."),
    "dashboard": ("fedsigma.cli.dashboard", "Show the runs of simulations or of a server in a browser."),
    "users": (
        "fedsigma.cli.dashboard",
        "Manage dashboard users: add, password, change, remove, list, token.",
    ),
    "bench": ("fedsigma.cli.bench", "Reproduce the tables of the CLIP-SVD paper, also federated: paper."),
    "runs": (_STUDY, "List the runs in a folder."),
    "report": (_STUDY, "Write the report of a run."),
}


class Commands(TyperGroup):
    """Imports a command's module only when that command is called, and reports errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a placeholder with the line of help; `resolve_command` returns the real command."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(name=cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the module of the command that is called, and return the command."""
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        group = typer.main.get_group(importlib.import_module(COMMANDS[name][0]).app)
        return name, group.commands.get(name, group), rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and report an error in one line."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:
            if os.environ.get("FEDSIGMA_DEBUG", "") not in ("", "0"):
                raise
            code = exit_code(error)
            text = " ".join(str(error).split()) or type(error).__name__
            if code == FAILED:
                text = f"unexpected {type(error).__name__}: {text} (FEDSIGMA_DEBUG=1 shows where)"
            typer.secho("Error: ", fg="red", nl=False, err=True)
            typer.echo(text, err=True)
            raise typer.Exit(code) from error


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error: a FedSigmaError's own, 3 for a file that cannot be used, else 1."""
    if isinstance(error, FedSigmaError):
        return error.code
    file_errors = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    return BAD_INPUT if isinstance(error, file_errors) else FAILED


main = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 unexpected error, 2 wrong usage, 3 bad input, 4 a check found problems.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fedsigma {__version__}")
        raise typer.Exit


@main.callback()
def fedsigma(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated few-shot adaptation of CLIP by its singular values.

    Studies are run with Flower: flwr run . --run-config 'study="demo"'. This command prepares them (inspect,
    backbone, data) and uses their results (runs, report, predict, export).
    """


if __name__ == "__main__":
    main()
