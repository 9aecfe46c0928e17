"""The commands of a coordinating server: create it, run it, and admit or revoke sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedsigma.common.config.schema import local_address, split_address
from fedsigma.common.ops.enrolment_files import SiteKeys, fingerprint
from fedsigma.common.ops.health import SERVING, check_health, check_web_health
from fedsigma.common.ops.supervisor import (
    Process,
    ProcessError,
    is_running,
    restart,
    states,
    stop,
    supervise,
)
from fedsigma.common.utils.console import print_table
from fedsigma.common.utils.errors import PROBLEMS
from fedsigma.server.deployment.certificates import CertificatePair, check_pair
from fedsigma.server.deployment.enrolment import Enrolment
from fedsigma.server.deployment.home import ServerConfig, ServerHome, ServerHomeError
from fedsigma.server.deployment.proxy import write_proxy_files
from fedsigma.server.deployment.services import server_processes

__all__ = ["app"]

PROCESSES = ("superlink", "worker", "auto-resume", "proxy", "dashboard")

app = typer.Typer(no_args_is_help=True)
server_app = typer.Typer(no_args_is_help=True, help="Run a coordinating server.")
app.add_typer(server_app, name="server")


Folder = Annotated[
    Path,
    typer.Option("--folder", "-f", envvar="FEDSIGMA_SERVER", help="The server's folder."),
]


@server_app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    address: Annotated[str, typer.Option(help="HOST:PORT by which sites reach this server.")],
    name: Annotated[str, typer.Option(help="The server's name in invitations.")] = "FedSigma server",
    listen: Annotated[
        str | None, typer.Option(help="Where the proxy listens.", show_default="0.0.0.0, address's port")
    ] = None,
    superlink: Annotated[
        str, typer.Option(help="Where Flower's SuperLink listens; no site may reach it.")
    ] = ServerConfig.superlink,
    health: Annotated[
        str | None,
        typer.Option(help="Address of the SuperLink's health service.", show_default="the next port"),
    ] = None,
    worker_health: Annotated[
        str | None,
        typer.Option(help="Address of the worker's health service.", show_default="the port after"),
    ] = None,
    proxy: Annotated[str, typer.Option(help="nginx, caddy, or none to run it separately.")] = "nginx",
    certificate: Annotated[
        Path | None, typer.Option(help="Your own certificate (chain) for the address, PEM.", exists=True)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.", exists=True)] = None,
    trust: Annotated[
        Path | None, typer.Option(help="The authority that signed it, PEM: sites trust it.", exists=True)
    ] = None,
    if_new: Annotated[
        bool, typer.Option("--if-new", help="Do nothing if the folder is a server's already.")
    ] = False,
) -> None:
    """Create a server: authority and certificates, secrets, database, proxy files.

    Exit code 3: the folder is not empty, or a value is invalid.
    """
    if if_new and (folder / "server.yaml").is_file():
        typer.echo(f"{ServerHome(folder).path} holds a server already; nothing was changed.")
        return
    if (certificate is None) != (key is None) or (certificate is None) != (trust is None):
        raise ServerHomeError("--certificate, --key and --trust belong together: pass all three or none")
    host, port = address.rpartition(":")[::2]
    config = ServerConfig(
        name=name,
        address=address,
        listen=listen or f"0.0.0.0:{port}",
        superlink=superlink,
        health=health or _next_to(superlink, 1),
        worker_health=worker_health or _next_to(superlink, 2),
        proxy=proxy,
    )
    own = CertificatePair(certificate.read_bytes(), key.read_bytes()) if certificate and key else None
    if own is not None:
        check_pair(own)
    server = ServerHome.create(folder, config, own=own, trust=trust.read_bytes() if trust else b"")
    write_proxy_files(server)
    typer.echo(f"Created the server in {server.path}. Start it, and invite sites to {address}:")
    typer.echo(f"  fedsigma server up --folder {server.path}")
    typer.echo(f"  fedsigma server invite SITE --folder {server.path}")
    typer.echo(f"Keep {server.tls('ca.key')} secret: anyone who has it can impersonate {host}.")


@server_app.command()
def up(
    folder: Folder,
    only: Annotated[
        str | None, typer.Option(help=f"One process in the foreground: {', '.join(PROCESSES)}.")
    ] = None,
) -> None:
    """Run the server in the foreground until Ctrl-C or SIGTERM.

    Supervises SuperLink, worker, auto-resume, proxy and, if the folder has a dashboard.yaml, the dashboard.

    With --only, this process becomes that one, for systemd or a container to supervise.

    Exit code 0: stopped; 3: it is running already, or a program is not installed.
    """
    server = ServerHome(folder)
    processes = _chosen(server, only)
    # In containers, only the proxy's container mounts the folder of these files.
    if only in (None, "proxy"):
        write_proxy_files(server)
    if only is None:
        supervise(processes, server.path)
    processes[0].replace_this(server.path)


@server_app.command()
def down(folder: Folder) -> None:
    """Stop a server that `up` runs."""
    stop(ServerHome(folder).path)


@server_app.command()
def status(
    folder: Folder,
    only: Annotated[
        str | None,
        typer.Option(help=f"One process: {', '.join(PROCESSES)}."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the state and health of each process; the proxy's by a request to the SuperLink through it.

    Exit code 0: all are serving, or the one given by --only; 4: one is not.
    """
    server = ServerHome(folder)
    supervised = {s.name: s for s in states(server.path)} if is_running(server.path) else {}
    rows = []
    for process in _chosen(server, only):
        state = supervised.get(process.name)
        rows.append(
            {
                "process": process.name,
                "state": state.state.lower() if state else "not supervised here",
                "health": _health(server, process),
                "pid": state.pid if state else 0,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(("process", "state", "health", "pid"), rows)
    if any(row["health"] not in ("", SERVING) for row in rows):
        raise typer.Exit(PROBLEMS)


@server_app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The site's name: letters, digits, '.', '_', '-'.")],
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="The invitation's file.", show_default="SITE.join.json")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="Days that it is valid.")] = 14,
    note: Annotated[str, typer.Option(help="Contact at the site.")] = "",
) -> None:
    """Write an invitation for a site, to be sent over a channel that both sides trust.

    Exit code 3: the site has joined, or the file exists.
    """
    path = out or Path(f"{site}.join.json")
    invitation = Enrolment(ServerHome(folder)).invite(site, path, days=days, note=note)
    typer.echo(
        f"Wrote {path}, valid until {invitation.expires}. It contains a secret: send it to this site only."
    )
    typer.echo(f"Read aloud on the phone: {fingerprint(invitation.certificates, invitation.word)}")
    typer.echo(f"Admit the site with the file of keys that it sends: fedsigma server admit {site}.keys.json")


@server_app.command()
def admit(
    file: Annotated[Path, typer.Argument(metavar="KEYS", help="The file of keys that the site sent.")],
    folder: Folder,
) -> None:
    """Admit a site with the keys it sent, or a joined site's new node key besides its old one.

    Exit code 3: the keys do not match the site's invitation, or the server is not running.
    """
    keys = SiteKeys.read(file)
    added = Enrolment(ServerHome(folder)).admit(keys)
    typer.echo(f"Site '{keys.site}' is admitted as node {added.node_id}.")
    typer.echo(f"Compare on the phone: {fingerprint(keys.node_key, keys.identity)}")


@server_app.command()
def sites(
    folder: Folder,
    keys: Annotated[
        bool, typer.Option(help="Print the identities in the form of site.yaml's `peers`.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the sites: invited, joined or revoked, and whether their node is online."""
    from fedsigma.server.deployment.flower_control import ControlError, FlowerControl

    server = ServerHome(folder)
    all_sites = Enrolment(server).sites()
    if keys:
        typer.echo("peers:")
        for site in (s for s in all_sites if s.identity):
            typer.echo(f'  {site.name}: "{site.identity}"')
        return
    try:
        nodes = FlowerControl(server).nodes()
    except ControlError as error:
        typer.echo(f"Cannot determine which sites are online: {error}", err=True)
        nodes = {}
    rows = []
    for site in all_sites:
        current = site.keys[-1] if site.keys else None
        node = nodes.get(current.node_id) if current else None
        rows.append(
            {
                "site": site.name,
                "state": site.state,
                "node": current.node_id if current else "",
                "online": node.status if node else "",
                "last seen": node.last_seen if node else "",
                "note": site.note,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(("site", "state", "node", "online", "last seen", "note"), rows)


@server_app.command()
def revoke(site: Annotated[str, typer.Argument(help="The site.")], folder: Folder) -> None:
    """Revoke all keys of a site at once; other sites continue."""
    for key in Enrolment(ServerHome(folder)).revoke(site):
        typer.echo(f"Node {key.node_id} of site '{site}' is revoked.")


@server_app.command()
def rotate(
    what: Annotated[str, typer.Argument(help="certificate, keys (sites' old node keys) or authority.")],
    folder: Folder,
    switch: Annotated[bool, typer.Option("--switch", help="authority: make the next one sign.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="authority: the file for sites.", show_default="trust.pem")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="certificate: your own new one (chain), PEM.", exists=True)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.", exists=True)] = None,
) -> None:
    """Replace the server's certificates, sites' old node keys, or the authority that sites trust.

    certificate: sites need no change, and runs continue. keys: revokes old node keys of sites whose new one
    has been online. authority: writes a file that sites install with `fedsigma site trust`; once all have
    done so, use --switch.

    Exit code 3: a file is invalid, or a step is missing.
    """
    from fedsigma.server.deployment import certificate_rotation

    if (certificate is None) != (key is None):
        raise ServerHomeError("--certificate and --key belong together: pass both or none")
    server = ServerHome(folder)
    if what == "keys":
        for old in Enrolment(server).retire_old_keys():
            typer.echo(f"The old node key of site '{old.site}' is revoked.")
    elif what == "certificate":
        own = CertificatePair(certificate.read_bytes(), key.read_bytes()) if certificate and key else None
        certificate_rotation.renew_certificates(server, own)
        typer.echo("Installed new certificates.")
        _restart(server, "superlink", "proxy")
    elif what == "authority" and not switch:
        path = out or Path("trust.pem")
        text = certificate_rotation.create_next_authority(server, path)
        typer.echo(f"Send {path} to every site, which installs it: fedsigma site trust {path.name}")
        typer.echo(f"Read aloud on the phone: {fingerprint(text)}")
        typer.echo("When all sites have it: fedsigma server rotate authority --switch")
    elif what == "authority":
        certificate_rotation.switch_authority(server)
        typer.echo("The new authority signs; sites that do not trust it can no longer connect.")
        _restart(server, "superlink", "worker", "proxy")
    else:
        raise ServerHomeError(f"'{what}' cannot be rotated: expected certificate, keys or authority")


def _restart(server: ServerHome, *processes: str) -> None:
    for process in processes if is_running(server.path) else ():
        try:
            restart(server.path, process)
            typer.echo(f"Restarted {process}.")
        except ProcessError as error:
            typer.echo(f"{error}: restart it yourself", err=True)


def _chosen(server: ServerHome, only: str | None) -> list[Process]:
    """Return all processes of a server, or the one of this name."""
    processes = server_processes(server)
    chosen = [process for process in processes if only in (None, process.name)]
    if not chosen and only == "dashboard":
        raise ServerHomeError(f"the dashboard needs {server.path / 'dashboard.yaml'}: write this file")
    if not chosen:
        raise ServerHomeError(f"no process '{only}': expected one of {', '.join(p.name for p in processes)}")
    return chosen


def _health(server: ServerHome, process: Process) -> str:
    if process.name == "dashboard":
        return _dashboard_health(server)
    if process.name != "proxy":
        return check_health(process.health) if process.health else ""
    name, _ = split_address(server.config.address, where="address")
    return check_health(
        local_address(server.config.listen, where="listen"),
        certificates=server.tls("sites.crt").read_bytes(),
        name=name,
    )


def _dashboard_health(server: ServerHome) -> str:
    """Ask the dashboard with the certificate of dashboard.yaml, or without TLS if a proxy terminates it."""
    from fedsigma.server.dashboard.config import DashboardConfig

    try:
        config = DashboardConfig.read(server.path)
        certificate = Path(config.certificate).read_bytes() if config.certificate else None
        return check_web_health(local_address(config.listen, where="listen"), certificate=certificate)
    except (ValueError, OSError) as error:
        # The health of the other processes is still shown.
        return f"unknown ({error})"


def _next_to(address: str, step: int) -> str:
    _, port = address.rpartition(":")[::2]
    return f"127.0.0.1:{int(port) + step}" if port.isdecimal() else address
