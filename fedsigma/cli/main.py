"""The command `fedsigma`: one list of commands, each imported when it runs, and one way to report errors."""

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
# Name -> (module with a typer `app`, one line of help): enough to print the list without importing torch.
COMMANDS = {
    "inspect": (_MODEL, "Count what a study would train on a backbone."),
    "backbone": (_MODEL, "Bring a backbone to a machine without internet: fetch, convert."),
    "data": (
        "fedsigma.cli.data",
        "Look at images before a study: check; published data sets: cards, fetch.",
    ),
    "identity": (_MODEL, "Make the key by which other sites know this one."),
    "audit": ("fedsigma.cli.audit", "Find what was changed in a log: verify."),
    "budget": (_MODEL, "Say what private studies have spent of a site's images."),
    "study": (_STUDY, "Simulate a study: run, check, privacy; or run it at a server: submit, status, stop."),
    "predict": (_MODEL, "Judge a folder of pictures or DICOM files with a finished study."),
    "serve": ("fedsigma.cli.serve", "Judge images by HTTP with a finished study."),
    "calibrate": (_MODEL, "Fit how sure a finished model says it is, on labelled images."),
    "explain": (_MODEL, "Say in words what a finished study changed."),
    "models": (
        "fedsigma.cli.models",
        "Finished models: list, show, diff, promote, combine, export, verify.",
    ),
    "export": (_MODEL, "Write a finished study's model as a plain open_clip folder."),
    "site": ("fedsigma.cli.site", "Run a hospital's site: enrol, doctor, up, status, approve, rotate."),
    "server": ("fedsigma.cli.server", "Run a coordinating server: init, up, invite, admit, sites, revoke."),
    "dashboard": ("fedsigma.cli.dashboard", "Show runs in a browser: of simulations, or of a server."),
    "users": (
        "fedsigma.cli.users",
        "Say who may see a server's dashboard: add, password, change, remove, list, token.",
    ),
    "bench": ("fedsigma.cli.bench", "Run the tables of CLIP-SVD's paper, also federated: paper."),
    "runs": (_STUDY, "List the runs in a folder."),
    "report": (_STUDY, "Write the report of a run."),
}


class Commands(TyperGroup):
    """Loads a command's module only when that command is called, and turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in with the line of help; `resolve_command` gives the real one."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(name=cmd_name, help=COMMANDS[cmd_name][1])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The real command that is called."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and report what goes wrong."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:
            if os.environ.get("FEDSIGMA_DEBUG", "") not in ("", "0"):
                raise
            code = exit_code(error)
            typer.secho("Error: ", fg="red", nl=False, err=True)
            typer.echo(describe(error, code), err=True)
            raise typer.Exit(code) from error


def load(name: str | None) -> click.Command:
    """Import the module of a command and pick the command."""
    module = importlib.import_module(COMMANDS[str(name)][0])
    group = typer.main.get_command(module.app)
    assert isinstance(group, click.Group)
    return group.commands[str(name)]


def exit_code(error: BaseException) -> int:
    """The code of a FedSigmaError; 3 for a file that is missing or may not be used; else 1."""
    if isinstance(error, FedSigmaError):
        return error.code
    if isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError):
        return BAD_INPUT
    if isinstance(error, PermissionError):
        return BAD_INPUT
    return FAILED


def describe(error: BaseException, code: int) -> str:
    """One line about an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    if code != FAILED:
        return text
    return f"unexpected {type(error).__name__}: {text} (FEDSIGMA_DEBUG=1 shows where)"


main = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 unexpected error, 2 wrong usage, 3 bad input, 4 a check found problems.",
)


def _version(wanted: bool) -> None:
    if wanted:
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
    backbone, data) and uses what they leave (runs, report, predict, export).
    """


if __name__ == "__main__":
    main()
