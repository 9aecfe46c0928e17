"""The commands that enrol, run and check a site, for a hospital's IT department."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from fedsigma.client.deployment.bundle_approval import BundleApprovals, bundle_digest, diff_bundles
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.services import node_process, worker_process
from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation, fingerprint
from fedsigma.common.ops.health import SERVING, check_health
from fedsigma.common.ops.supervisor import is_running, restart, states, stop, supervise
from fedsigma.common.utils.errors import PROBLEMS

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Run a hospital's site.")

PROCESSES = {"node": node_process, "worker": worker_process}


def _check_process(name: str | None) -> str | None:
    if name not in (None, *PROCESSES):
        raise EnrolmentFileError(f"unknown process '{name}': expected {' or '.join(PROCESSES)}")
    return name


Folder = Annotated[
    Path, typer.Option("--folder", "-f", envvar="FEDSIGMA_SITE_FOLDER", help="The site's folder.")
]
Only = Annotated[str | None, typer.Option(callback=_check_process, help="One process only: node or worker.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFile = Annotated[
    Path | None, typer.Option(help="The key file to write, for the server.", show_default="SITE.keys.json")
]


@app.command()
def enrol(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The invitation from the server.")],
    folder: Folder,
    out: KeyFile = None,
) -> None:
    """Create this site's folder and keys from an invitation.

    Private keys never leave the folder; the key file for the server holds public keys only.

    Exit codes: 0 enrolled, 3 the invitation is invalid or expired, or the folder belongs to another site.
    """
    invited = Invitation.read(invitation)
    site, keys = SiteHome.enrol(folder, invited)
    path = out or Path(f"{invited.site}.keys.json")
    keys.write(path)
    server = f"{invited.server_name} at {invited.address}"
    typer.echo(f"Created site '{invited.site}' in {site.path}, for {server}.")
    typer.echo(f"The server's fingerprint: {fingerprint(invited.certificates, invited.word)}")
    typer.echo(f"This site's fingerprint: {fingerprint(keys.node_key, keys.identity)}")
    typer.echo(f"Send {path} to the server, and compare both fingerprints by phone.")
    typer.echo(f"Then edit {site.path / 'site.yaml'}, the policy of this site.")


@app.command()
def up(
    folder: Folder,
    only: Only = None,
    node: Annotated[
        str | None,
        typer.Option(envvar="FEDSIGMA_NODE", help="With --only worker: HOST:PORT of the node."),
    ] = None,
) -> None:
    """Run the site in the foreground until Ctrl-C or SIGTERM: the node and the worker, supervised.

    With --only, the command is replaced by that one process, for systemd or a container to supervise.

    Exit codes: 0 stopped, 3 the site is already running, or site.yaml is invalid.
    """
    if node and only != "worker":
        raise EnrolmentFileError(
            "--node needs --only worker; for both processes, set node in connection.yaml"
        )
    site = SiteHome(folder)
    if node:
        site.connection = replace(site.connection, node=node)
    if only:
        PROCESSES[only](site).replace_this(site.path)
    supervise([process(site) for process in PROCESSES.values()], site.path)


@app.command()
def down(folder: Folder) -> None:
    """Stop a running site."""
    stop(SiteHome(folder).path)


@app.command()
def status(
    folder: Folder,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Show the state of the node and the worker.

    Exit codes: 0 all processes serve, 4 a process does not serve.
    """
    site = SiteHome(folder)
    # Not by worker_process, which writes the worker's programs and reads site.yaml.
    health = {"node": site.connection.node_health, "worker": site.connection.worker_health}
    supervised = {s.name: s.state.lower() for s in states(site.path)} if is_running(site.path) else {}
    rows = [
        {
            "process": name,
            "state": supervised.get(name, "not supervised here"),
            "health": check_health(address) if address else "",
        }
        for name, address in health.items()
        if only in (None, name)
    ]
    lines = [f"{row['process']:<8}{row['state']:<22}{row['health']}" for row in rows]
    typer.echo(json.dumps(rows, indent=2) if as_json else "\n".join(lines))
    if any(row["health"] not in ("", SERVING) for row in rows):
        raise typer.Exit(PROBLEMS)


@app.command()
def doctor(
    folder: Folder,
    offline: Annotated[bool, typer.Option("--offline", help="Skip the checks that need the server.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Skip backbones, images and training.")] = False,
    only: Only = None,
    as_json: Json = False,
) -> None:
    """Check this site's requirements for a study: folder, keys, connection, clock, backbones, images.

    The results are not sent anywhere.

    Exit codes: 0 all checks passed, 4 a check found problems.
    """
    from fedsigma.client.deployment.diagnostics import run_checks

    results = []
    for result in run_checks(folder, offline=offline, deep=not quick, only=only):
        results.append(result)
        if not as_json:
            typer.secho("ok   " if result.ok else "FAIL ", fg="green" if result.ok else "red", nl=False)
            typer.echo(f"{result.check:<20} {result.detail}")
            if result.remedy:
                typer.echo(f"{'':<26}-> {result.remedy}")
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2))
    if not all(result.ok for result in results):
        raise typer.Exit(PROBLEMS)


@app.command()
def schema() -> None:
    """Print the JSON Schema of site.yaml, with which editors complete and check it.

    Example: fedsigma site schema > site.schema.json
    """
    from fedsigma.client.site.policy import SitePolicy
    from fedsigma.common.config.schema import json_schema

    typer.echo(json.dumps(json_schema(SitePolicy), indent=2))


@app.command()
def approve(
    folder: Folder,
    digest: Annotated[
        str | None,
        typer.Argument(help="SHA-256 of the bundle, or its start.", show_default="the latest pending bundle"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without a prompt.")] = False,
) -> None:
    """Show the differences of a pending app bundle to the last approved one, and approve it.

    Exit codes: 0 approved, 1 not confirmed, 3 no such bundle.
    """
    site = SiteHome(folder)
    bundles = BundleApprovals(site.path)
    pending = bundles.pending()
    if digest is None and not pending:
        last = bundles.last_approved()
        typer.echo("No bundle is pending.")
        typer.echo(f"The last approved bundle is {bundle_digest(last)}." if last else "None is approved yet.")
        return
    bundle = bundles.find(digest or pending[0].stem)
    before = bundles.last_approved()
    typer.echo(diff_bundles(before, bundle) or "(the same files as the last approved bundle)")
    other = "the last approved bundle" if before else "no other"
    typer.echo(f"\nBundle {bundle_digest(bundle)}, compared with {other}.")
    if not yes:
        typer.confirm("Approve it?", abort=True)
    bundles.approve(bundle)
    typer.echo(f"Approved: {site.path / 'site.yaml'} now lists it.")


@app.command()
def rotate(
    folder: Folder,
    switch: Annotated[bool, typer.Option("--switch", help="Replace the old key by the new one.")] = False,
    out: KeyFile = None,
) -> None:
    """Renew the node's key in two steps: create and send a new key; once it is admitted, run with --switch.

    The old key remains valid until the switch; afterwards the server rejects it.

    Exit codes: 0 success, 3 there is no new key to switch to.
    """
    site = SiteHome(folder)
    if not switch:
        keys = site.rotate_key()
        path = out or Path(f"{keys.site}.keys.json")
        keys.write(path)
        typer.echo(f"Send {path} to the server. Once the key is admitted: fedsigma site rotate --switch")
        return
    site.switch_key()
    typer.echo("The node uses the new key from its next start.")
    if is_running(site.path):
        restart(site.path, "node")
        typer.echo("Restarted the node.")


@app.command()
def trust(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="PEM file of certificates from the server.")],
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Trust them without a prompt.")] = False,
) -> None:
    """Replace the trusted certificates by those that the server sent.

    Exit codes: 0 trusted, 1 not confirmed, 3 the file has no certificate that is valid now.
    """
    site = SiteHome(folder)
    pem, certificates = site.read_trust(file)
    for certificate in certificates:
        typer.echo(f"  {certificate}")
    typer.echo(f"Fingerprint, to compare with the server by phone: {fingerprint(pem)}")
    if not yes:
        typer.confirm("Trust only these certificates?", abort=True)
    site.trust(pem)
    typer.echo("The node trusts them from its next start.")
    _restart_node(site)


def _restart_node(site: SiteHome) -> None:
    if is_running(site.path):
        restart(site.path, "node")
        typer.echo("Restarted the node.")
