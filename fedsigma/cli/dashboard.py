"""The command `fedsigma dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsigma.common.config.schema import ConfigError, split_address

__all__ = ["app"]

LISTEN = "127.0.0.1:8050"

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `dashboard` a command of its own."""


@app.command()
def dashboard(
    place: Annotated[Path, typer.Argument(help="A folder of runs, one run, or a server's folder.")],
    listen: Annotated[
        str,
        typer.Option(help="HOST:PORT, for runs; a server's is in its dashboard.yaml.", show_default=LISTEN),
    ] = "",
) -> None:
    """Show runs in a browser, live, until it is stopped with Ctrl-C. It changes nothing in them.

    Of simulations: prints a link that lets one browser in, once. Of a server: for its users (`fedsigma
    users`); operators start, stop and go on with studies there. A study does not depend on it.

    Exit code 3: there are no runs, or dashboard.yaml does not do.

    Example: fedsigma dashboard runs
    """
    from fedsigma.server.dashboard.config import check_installed

    check_installed()
    from fedsigma.server.dashboard.app import serve, server_app
    from fedsigma.server.dashboard.config import FILE, DashboardConfig
    from fedsigma.server.deployment.home import ServerHome

    place = place.expanduser().resolve()
    if not (place / "server.yaml").is_file():
        _of_runs(place, listen or LISTEN)
        return
    if listen:
        raise ConfigError(f"{place} is a server: say `listen: {listen}` in {place / FILE}")
    config = DashboardConfig.read(place)
    app = server_app(ServerHome(place), config)
    words = f"Dashboard: {config.access.origins[0]} (users: fedsigma users list -f {place})"
    certificate, key = (Path(name) if name else None for name in (config.certificate, config.key))
    serve(app, listen=config.listen, certificate=certificate, key=key, announce=lambda: typer.echo(words))


def _of_runs(place: Path, listen: str) -> None:
    from fedsigma.server.dashboard.app import runs_app, serve
    from fedsigma.server.dashboard.auth.login import OneTimeLink
    from fedsigma.server.dashboard.auth.settings import HERE, AccessSettings
    from fedsigma.server.runs.run_dir import RunDirError

    if not place.is_dir():
        raise RunDirError(f"{place} is no folder: name the one that holds the run folders")
    host, port = split_address(listen, where="--listen")
    if host not in HERE:
        raise ConfigError(
            f"--listen is {listen}: the dashboard of a folder is for this machine alone, at 127.0.0.1:PORT;"
            " over a network use an SSH tunnel, or a server's dashboard"
        )
    link = OneTimeLink()
    origins = (f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    app = runs_app(place, settings=AccessSettings(origins=origins), link=link)

    def announce() -> None:
        typer.echo(f"Dashboard: {origins[0]}/login?token={link.token}")
        typer.echo("The link lets one browser in, once. Ctrl-C ends it.")

    serve(app, listen=listen, announce=announce)
