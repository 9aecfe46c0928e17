"""A real server and real sites on this machine: Flower's own processes, over TLS through nginx."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsigma.client.deployment.bundle_approval import BundleApprovals
from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.ops.flower_compat import build_fab_from_disk
from fedsigma.common.ops.supervisor import ProcessError, free_ports, is_running, states, stop
from fedsigma.server.deployment.enrolment import Enrolment
from fedsigma.server.deployment.home import ServerConfig, ServerHome
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.simulation.app_bundle import write_app
from tests.deployment.network import SERVER, Network, may_make_namespaces

SITES = ("east", "north", "south")
STUDY = """\
name: three-sites
backbone: starter
classes: [neutrophil, lymphocyte, monocyte, eosinophil]
template: "a photo of a {}."
data: {source: demo, options: {laboratories: [east, north, south], train: 3, test: 2}, sites_by: site}
shots: 2
training: {learning_rate: 0.04, batch_size: 8, local_steps: 1, precision: float32, augment: microscopy}
federation: {strategy: fedavg, rounds: 2, min_sites: 2, round_timeout_s: 240}
baselines: []
seed: 1
"""
PATIENCE_S = 180.0
BIN = Path(sys.executable).parent


def missing() -> str:
    """Why no server can be started here; empty if it can."""
    return "" if shutil.which("nginx") else "nginx is not installed: the proxy in front of the server is real"


def wait_for(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s:g} s"
        time.sleep(0.3)
    return found


@dataclass
class Deployment:
    """A server and its sites; `server` and `sites` are their folders."""

    network: Network
    server: ServerHome
    environment: dict[str, str]
    sites: dict[str, SiteHome] = field(default_factory=dict)
    _up: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, place: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a `fedsigma` command at a place, to its end."""
        command = [*self.network.inside(place), str(BIN / "fedsigma"), *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def python(self, place: str, script: Path, *words: object) -> list[str]:
        """Run a script at a place; returns the lines that it prints."""
        command = [*self.network.inside(place), sys.executable, str(script), *map(str, words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script.name}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.splitlines()

    def start(self, place: str) -> None:
        """Start the server's or a site's processes, supervised."""
        folder = self.folder(place)
        if place == SERVER:
            command = [*self.network.inside(SERVER), str(BIN / "fedsigma"), "server", "up", "-f", str(folder)]
        else:
            namespaces = [self.network.namespace(name) for name in (place, f"{place}-worker")]
            command = [sys.executable, str(Path(__file__).with_name("site_up.py")), str(folder), *namespaces]
        with (folder / "logs" / "up.log").open("ab") as log:
            self._up[place] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def stop(self, place: str) -> None:
        """End what `start` started, and wait for it."""
        process = self._up.pop(place)
        wait_for(lambda: is_running(self.folder(place)), f"the supervisor of {place}")
        stop(self.folder(place))
        assert process.wait(timeout=60) == 0

    def folder(self, place: str) -> Path:
        """The folder of the server or of a site."""
        return self.server.path if place == SERVER else self.sites[place].path

    def pid(self, place: str, process: str) -> int:
        """The process number of one of a place's processes, 0 if it does not run."""
        return {one.name: one.pid for one in states(self.folder(place))}.get(process, 0)

    def kill(self, place: str, process: str) -> None:
        """End a process as a power cut would; its supervisor starts it again."""
        os.kill(wait_for(lambda: self.pid(place, process), f"{process} of {place} runs"), signal.SIGKILL)

    def well(self, place: str) -> bool:
        """Whether all processes of a place say by gRPC that they serve."""
        kind = "server" if place == SERVER else "site"
        # The worker's health is asked from where the worker is.
        names = [place] if place == SERVER or not self.network.apart else [place, f"{place}-worker"]
        found = [
            json.loads(self.run(name, kind, "status", "--json", "-f", self.folder(place), check=False).stdout)
            for name in names
        ]
        health = {row["process"]: [t[n]["health"] for t in found] for n, row in enumerate(found[0])}
        return all("serving" in seen or not any(seen) for seen in health.values())

    def admit(self, site: str, *, options: str = "train: 3, test: 2") -> None:
        """Have a new site join, with one made-up laboratory's pictures, and approve the bundle."""
        root = self.server.path.parent
        invitation = Enrolment(self.server).invite(site, root / f"{site}.join.json", days=1)
        made, keys = SiteHome.enrol(root / site, invitation)
        node, node_health, worker_health = free_ports(3)
        address = self.network.node(site)
        for old, new in (
            ("127.0.0.1:9101", f"{address}:{node}"),
            ("127.0.0.1:9102", f"127.0.0.1:{node_health}"),
            ("127.0.0.1:9103", f"127.0.0.1:{worker_health}"),
            ("folder:/data", f"demo\noptions: {{laboratories: [{site}], {options}}}"),
            ("studies: []", "studies: [three-sites]"),
            ("cpus: null", "cpus: 1"),
        ):
            for name in ("connection.yaml", "site.yaml"):
                file = made.path / name
                file.write_text(file.read_text().replace(old, new))
        BundleApprovals(made.path).approve(build_fab_from_disk(write_app(root / "app")))
        keys.write(root / f"{site}.keys.json")
        self.run(SERVER, "server", "admit", root / f"{site}.keys.json", "-f", self.server.path)
        self.sites[site] = SiteHome(made.path)

    def online(self, sites: Sequence[str] = SITES) -> bool:
        """Whether the server sees these sites."""
        told = self.run(SERVER, "server", "sites", "--json", "-f", self.server.path).stdout
        return set(sites) <= {one["site"] for one in json.loads(told) if one["online"] == "online"}

    def submit(self, study: Path, *words: object) -> tuple[str, RunDir]:
        """Submit a study; returns its run's number and its folder, which may not be there yet."""
        self.run(SERVER, "study", "submit", study, "-f", self.server.path, *words)
        latest = self.submitted()[0]
        return latest["run"], RunDir(Path(latest["folder"]))

    def submitted(self) -> list[dict[str, Any]]:
        """What `fedsigma study status` says, the latest first."""
        done = self.run(SERVER, "study", "status", "--json", "-f", self.server.path)
        return list(json.loads(done.stdout))

    def ended(self, folder: RunDir) -> str:
        """How the latest run of a folder ended, or nothing while one goes on."""
        try:
            latest = next(one for one in self.submitted() if one["folder"] == str(folder.path))
        except AssertionError:  # the SuperLink is down
            return ""
        return str(latest["status"]) if latest["status"].startswith("finished") else ""

    def busy(self, site: str) -> list[int]:
        """The processes in which a site works on a task now."""
        mark = f"FEDSIGMA_SITE={self.sites[site].path / 'site.yaml'}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"clientapp" in (process / "cmdline").read_bytes():
                    found += [int(process.name)] if mark in (process / "environ").read_bytes() else []
        return found

    def received(self, site: str, run: str, round: int) -> bool:
        """Whether a site's node has all of a round's message."""
        log = (self.folder(site) / "logs" / "node.log").read_text()
        return "Received successfully" in log.partition(f"[RUN {run}, ROUND {round}]")[2]

    def close(self) -> None:
        """End everything that is left."""
        for place, process in list(self._up.items()):
            with suppress(ProcessError):
                stop(self.folder(place))
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
        self.network.remove()


def reached(folder: RunDir, round: int) -> bool:
    """Whether a run has begun this round."""
    return any(e["kind"] == "round_start" and e["round"] >= round for e in folder.events())


@contextmanager
def deployed(
    folder: Path, *, sites: Sequence[str] = SITES, later: Sequence[str] = ()
) -> Iterator[Deployment]:
    """A running server with three sites, each with one made-up laboratory's pictures.

    Args:
        folder: a new one.
        sites: that join at once.
        later: that have a place in the network, and join later.
    """
    network = Network([*sites, *later], may_make_namespaces())
    outer, link, health, worker, pages = free_ports(5)
    config = ServerConfig(
        name="Tests",
        address=f"{network.server}:{outer}",
        listen=f"{network.server}:{outer}",
        superlink=f"127.0.0.1:{link}",
        health=f"127.0.0.1:{health}",
        worker_health=f"127.0.0.1:{worker}",
    )
    network.make()
    server = ServerHome.create(folder / "server", config, own=None)
    shown = f"{network.server}:{pages}"
    (server.path / "dashboard.yaml").write_text(
        f"listen: {shown}\ncertificate: tls/outer.crt\nkey: tls/outer.key\naccess: {{origins: ['https://{shown}']}}\n"
    )
    # What works at a site must not find a study's server by chance, so no variable of ours is passed on.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDSIGMA_")}
    environment |= {"FEDSIGMA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    found = Deployment(network, server, environment)
    try:
        found.start(SERVER)
        wait_for(lambda: found.well(SERVER), "the server serves")
        for site in sites:
            found.admit(site)
            found.start(site)
        for site in sites:
            wait_for(lambda site=site: found.well(site), f"site {site} serves")
        wait_for(found.online, "all sites are online")
        yield found
    finally:
        found.close()
