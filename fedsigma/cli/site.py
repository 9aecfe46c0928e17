"""The commands of a hospital's IT: join a server, run the site, approve bundles."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedsigma.client.deployment.bundle_approval import BundleApprovals, bundle_digest, diff_bundles
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.services import node_process, worker_process
from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation, fingerprint
from fedsigma.common.ops.health import SERVING, health_of
from fedsigma.common.ops.supervisor import restart, running, states, stop, supervise
from fedsigma.common.utils.errors import PROBLEMS

__all__ = ["app"]


app = typer.Typer(no_args_is_help=True)
site_app = typer.Typer(no_args_is_help=True, help="Run a hospital's site.")
app.add_typer(site_app, name="site")


@app.callback()
def _group() -> None:
    """Keep `site` a group of its own."""


PROCESSES = ("node", "worker")

Folder = Annotated[
    Path, typer.Option("--folder", "-f", envvar="FEDSIGMA_SITE_FOLDER", help="The site's folder.")
]


@site_app.command()
def enrol(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The file from the server.")],
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="The file of keys to send back.", show_default="SITE.keys.json")
    ] = None,
) -> None:
    """Make this site's folder and keys. Private keys never leave it; the file to send back has public ones.

    Exit code 3: the invitation is damaged or too old, or the folder belongs to a site already.
    """
    given = Invitation.read(invitation)
    made, keys = SiteHome.enrol(folder, given)
    path = out or Path(f"{given.site}.keys.json")
    keys.write(path)
    typer.echo(f"Made site '{given.site}' in {made.path}, for {given.server_name} at {given.address}.")
    typer.echo(f"The server read this aloud: {fingerprint(given.certificates, given.word)}")
    typer.echo(f"Send {path} back, and read this aloud: {fingerprint(keys.node_key, keys.identity)}")
    typer.echo(f"Then write {made.path / 'site.yaml'}: what this site allows.")


@site_app.command()
def up(
    folder: Folder,
    only: Annotated[str | None, typer.Option(help="One process in the foreground: node or worker.")] = None,
    node: Annotated[
        str | None,
        typer.Option(
            envvar="FEDSIGMA_NODE", help="With --only worker: HOST:PORT of the node, not connection.yaml's."
        ),
    ] = None,
) -> None:
    """Run the site in the foreground until Ctrl-C or SIGTERM: the node and the worker, supervised.

    With --only, this becomes that one process, for systemd or a container to supervise.

    Exit code 0: stopped; 3: it runs already, or site.yaml does not read.
    """
    _check_process(only)
    if node and only != "worker":
        raise EnrolmentFileError(
            "--node goes with --only worker: for both processes, connection.yaml says it"
        )
    site = SiteHome(folder)
    if node:
        site.connection = replace(site.connection, node=node)
    if only == "node":
        node_process(site).replace_this(site.path)
    if only == "worker":
        worker_process(site).replace_this(site.path)
    supervise([node_process(site), worker_process(site)], site.path)


@site_app.command()
def down(folder: Folder) -> None:
    """Stop a site that `up` runs."""
    stop(SiteHome(folder).path)


@site_app.command()
def status(
    folder: Folder,
    only: Annotated[
        str | None, typer.Option(help="One process: node or worker, where it has a container of its own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")] = False,
) -> None:
    """Say how the node and the worker are.

    Exit code 0: both serve, or the one asked for; 4: one does not.
    """
    _check_process(only)
    site = SiteHome(folder)
    # Not from the processes themselves: to make the worker's would write its programs, and read site.yaml.
    health = {"node": site.connection.node_health, "worker": site.connection.worker_health}
    known = {s.name: s.state.lower() for s in states(site.path)} if running(site.path) else {}
    rows = [
        {
            "process": name,
            "state": known.get(name, "not supervised here"),
            "health": health_of(address) if address else "",
        }
        for name, address in health.items()
        if only in (None, name)
    ]
    for row in rows:
        if not as_json:
            typer.echo(f"{row['process']:<8}{row['state']:<22}{row['health']}")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    if any(row["health"] not in ("", SERVING) for row in rows):
        raise typer.Exit(PROBLEMS)


@site_app.command()
def doctor(
    folder: Folder,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs the server.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out backbones, images and training.")] = False,
    only: Annotated[
        str | None, typer.Option(help="What one process needs: node or worker, by its own user or container.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")] = False,
) -> None:
    """Check all that a study needs of this site: folder, keys, way to the server, clock, backbone, images.

    Nothing that is found is sent anywhere.

    Exit code 0: all is well; 4: a check found problems.
    """
    from dataclasses import asdict

    from fedsigma.client.deployment.diagnostics import run_checks

    _check_process(only)
    found = []
    for one in run_checks(folder, offline=offline, deep=not quick, only=only):
        found.append(one)
        if not as_json:
            typer.secho("ok   " if one.ok else "FAIL ", fg="green" if one.ok else "red", nl=False)
            typer.echo(f"{one.check:<20} {one.detail}")
            if one.remedy:
                typer.echo(f"{'':<26}-> {one.remedy}")
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
    if not all(one.ok for one in found):
        raise typer.Exit(PROBLEMS)


@site_app.command()
def schema() -> None:
    """Print the JSON Schema of site.yaml, with which editors complete and check it.

    Example: fedsigma site schema > site.schema.json
    """
    from fedsigma.client.site.policy import SitePolicy
    from fedsigma.common.config.schema import json_schema

    typer.echo(json.dumps(json_schema(SitePolicy), indent=2))


@site_app.command()
def approve(
    folder: Folder,
    digest: Annotated[
        str | None,
        typer.Argument(help="The bundle's SHA-256 or its beginning.", show_default="the latest refused"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without being asked.")] = False,
) -> None:
    """Show what a refused app bundle brings beside the last approved one, and approve it.

    Exit code 1: not approved; 3: there is no such bundle.
    """
    site = SiteHome(folder)
    bundles = BundleApprovals(site.path)
    pending = bundles.pending()
    if digest is None and not pending:
        last = bundles.last_approved()
        typer.echo("No bundle waits for approval.")
        typer.echo(f"The last approved one is {bundle_digest(last)}." if last else "None was approved yet.")
        return
    bundle = bundles.find(digest or pending[0].stem)
    before = bundles.last_approved()
    typer.echo(diff_bundles(before, bundle) or "(the same files as the last approved bundle)")
    typer.echo(
        f"\nBundle {bundle_digest(bundle)}, beside {'the last approved one' if before else 'nothing'}."
    )
    if not yes:
        typer.confirm("Approve it?", abort=True)
    bundles.approve(bundle)
    typer.echo(f"Approved: it may run here from now on ({site.path / 'site.yaml'}).")


@site_app.command()
def rotate(
    folder: Folder,
    switch: Annotated[bool, typer.Option("--switch", help="Take the new key into use.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file of keys to send.", show_default="SITE.keys.json")
    ] = None,
) -> None:
    """Renew the node's key in two steps: make a new one and send it; once the server has it, --switch.

    Until the switch the old key goes on working, and the server shuts it out afterwards.
    """
    site = SiteHome(folder)
    if not switch:
        keys = site.rotate_key()
        path = out or Path(f"{keys.site}.keys.json")
        keys.write(path)
        typer.echo(f"Send {path} to the server. When it has let the key in: fedsigma site rotate --switch")
        return
    site.switch_key()
    typer.echo("The new key is in use from the node's next start.")
    if running(site.path):
        restart(site.path, "node")
        typer.echo("Restarted the node.")


@site_app.command()
def trust(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The certificates from the server, PEM.")],
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Trust them without being asked.")] = False,
) -> None:
    """Trust the server's next authority beside its present one; the file comes from the server.

    Exit code 1: not confirmed; 3: the file holds no certificate that is valid now.
    """
    site = SiteHome(folder)
    found = site.read_trust(file)
    for one in found.subjects:
        typer.echo(f"  {one}")
    typer.echo(f"The server reads this aloud: {fingerprint(found.pem)}")
    if not yes:
        typer.confirm("Trust them, and nothing else?", abort=True)
    site.trust(found)
    typer.echo("They are trusted from the node's next start.")
    if running(site.path):
        restart(site.path, "node")
        typer.echo("Restarted the node.")


def _check_process(name: str | None) -> None:
    if name not in (None, *PROCESSES):
        raise EnrolmentFileError(f"no process '{name}': there are {' and '.join(PROCESSES)}")
