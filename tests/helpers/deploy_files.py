"""What the tests of deploy/ have in common: files, tools that may be missing, commands by the real parser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
import typer
import yaml

from fedsigma.cli.main import main
from fedsigma.cli.server import PROCESSES as SERVER_PROCESSES
from fedsigma.cli.site import PROCESSES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FOLDERS = {"server": "/var/lib/fedsigma/server", "site": "/var/lib/fedsigma/site"}
# What each command's --only may say.
ONLY = {"server": SERVER_PROCESSES, "site": PROCESSES}
UID = 10001


def tool(name: str) -> str:
    """A program of this environment or of the machine; the test is skipped where it is not installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*command: str | Path) -> str:
    """What a checker prints; fails with it if the checker does."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Read `fedsigma WORDS` as the command line does, without running it: "site up", and its options."""
    rest, names = list(words), []
    command: click.Command = typer.main.get_command(main)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(click.Context(command), rest)
        assert found is not None, words
        command = found
        names.append(str(name))
    environment = {"FEDSIGMA_SERVER": FOLDERS["server"], "FEDSIGMA_SITE_FOLDER": FOLDERS["site"]}
    with mock.patch.dict(os.environ, environment):
        context = command.make_context(names[-1], rest)
    only = context.params.get("only")
    assert only is None or only in ONLY[names[0]], words
    return " ".join(names), context.params


def process_of(words: Sequence[str]) -> str:
    """Which process `fedsigma WORDS` becomes: "site node"."""
    name, options = parse(words)
    assert name in ("server up", "site up") and options["only"], words
    group = name.split()[0]
    assert str(options["folder"]) == FOLDERS[group], words
    return f"{group} {options['only']}"


def read_yaml(path: Path, **values: str) -> Any:
    """A compose file as an engine reads it, with these variables set and others at their defaults."""

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        assert name in values or default is not None, f"{path.name}: no value for {name}"
        return values.get(name, default)

    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", value, text))
