"""A real centre and real sites on this machine: Flower's own processes, over TLS through nginx."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

from fedsigma.client.hospital.bundles import Bundles
from fedsigma.client.hospital.folder import SiteFolder
from fedsigma.common.health import SERVING, health_of
from fedsigma.common.processes import ProcessError, running, stop
from fedsigma.server.bundle import write_app
from fedsigma.server.centre.control import Control
from fedsigma.server.centre.enrolment import Enrolment
from fedsigma.server.centre.folder import CentreFolder, ServerConfig
from fedsigma.server.centre.studies import Studies

SITES = ("east", "north", "south")
STUDY = """\
name: three-sites
backbone: starter
classes: [neutrophil, lymphocyte, monocyte, eosinophil]
template: "a photo of a {}."
data: {source: demo, options: {laboratories: [east, north, south], train: 3, test: 2}, sites_by: site}
shots: 2
training: {learning_rate: 0.04, batch_size: 8, local_steps: 1, precision: float32, augment: microscopy}
federation: {strategy: fedavg, rounds: 2, min_sites: 3, round_timeout_s: 240}
baselines: []
seed: 1
"""
PATIENCE_S = 120.0


def missing() -> str:
    """Why no centre can be started here; empty if it can."""
    return "" if shutil.which("nginx") else "nginx is not installed: the proxy in front of the centre is real"


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s:g} s"
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def command(*words: object) -> list[str]:
    return [str(Path(sys.executable).parent / "fedsigma"), *map(str, words)]


@dataclass
class Deployment:
    """A centre and its sites; `centre` and `sites` are their folders."""

    centre: CentreFolder
    sites: dict[str, SiteFolder]
    environment: dict[str, str]
    _up: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, kind: str, folder: Path) -> None:
        """`fedsigma server up` or `fedsigma site up`, in the background."""
        with (folder / "logs" / "up.log").open("ab") as log:
            self._up[str(folder)] = subprocess.Popen(
                command(kind, "up", "-f", folder), env=self.environment, stdout=log, stderr=log
            )

    def stop(self, folder: Path) -> None:
        """End what `start` started, and wait for it."""
        process = self._up.pop(str(folder))
        if running(folder):
            stop(folder)
        else:
            process.terminate()
        assert process.wait(timeout=60) == 0

    @property
    def studies(self) -> Studies:
        """The centre's studies."""
        return Studies(self.centre)

    def start_all(self) -> None:
        """Start the centre, let each site in that is not, and start them; wait until all are online."""
        self.start("server", self.centre.path)
        wait_for(lambda: health_of(self.centre.config.health) == SERVING, "the SuperLink serves")
        enrolment = Enrolment(self.centre)
        for name, site in self.sites.items():
            self.start("site", site.path)
            wait_for(lambda c=site.connection: health_of(c.node_health) == SERVING, f"the node of {name}")
        names = enrolment.site_of_node()

        def online() -> bool:
            nodes = Control(self.centre).nodes()
            return {names[n] for n, node in nodes.items() if node.status == "online" and n in names} == set(
                self.sites
            )

        wait_for(online, "all sites are online")

    def close(self) -> None:
        """End everything that is left."""
        for folder, process in list(self._up.items()):
            with suppress(ProcessError):
                stop(Path(folder))
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """A running centre with three sites, each with one made-up laboratory's pictures."""
    outer, link, health, worker = free_ports(4)
    config = ServerConfig(
        name="Tests",
        address=f"127.0.0.1:{outer}",
        listen=f"127.0.0.1:{outer}",
        superlink=f"127.0.0.1:{link}",
        health=f"127.0.0.1:{health}",
        worker_health=f"127.0.0.1:{worker}",
    )
    centre = CentreFolder.create(folder / "centre", config, own=None)
    environment = {**os.environ, "FEDSIGMA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    found = Deployment(centre, {}, environment)
    bundle = build_fab_from_disk(write_app(folder / "app"))
    try:
        found.start("server", centre.path)
        wait_for(lambda: health_of(config.health) == SERVING, "the SuperLink serves")
        enrolment = Enrolment(centre)
        for name in SITES:
            invitation = enrolment.invite(name, folder / f"{name}.join.json", days=1)
            site, keys = SiteFolder.enrol(folder / name, invitation)
            node, node_health, worker_health = free_ports(3)
            file = site.path / "connection.yaml"
            text = file.read_text().replace("127.0.0.1:9101", f"127.0.0.1:{node}")
            text = text.replace("127.0.0.1:9102", f"127.0.0.1:{node_health}")
            file.write_text(text.replace("127.0.0.1:9103", f"127.0.0.1:{worker_health}"))
            rules = (site.path / "site.yaml").read_text()
            options = f"demo\noptions: {{laboratories: [{name}], train: 3, test: 2}}"
            rules = rules.replace("folder:/data", options).replace("studies: []", "studies: [three-sites]")
            (site.path / "site.yaml").write_text(rules.replace("cpus: null", "cpus: 1"))
            Bundles(site.path).approve(bundle)
            enrolment.admit(keys)
            found.sites[name] = SiteFolder(site.path)
        found.stop(centre.path)
        found.start_all()
        yield found
    finally:
        found.close()
