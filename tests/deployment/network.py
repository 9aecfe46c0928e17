"""Network namespaces for a server and its sites on one machine; without the right to make them, one host.

Each site's node has one link, to the server. Its worker, the process that sees images, has one link too, to
its node, which forwards nothing: it has no way out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

SERVER = "server"
SERVER_ADDRESS = "10.77.0.1"
NO_ROUTER = "open('/proc/sys/net/ipv4/ip_forward', 'w').write('0')"


def may_make_namespaces() -> bool:
    """Whether this process can make network namespaces and enter them."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        return False
    name = f"fst{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    try:
        entered = ["nsenter", f"--net=/run/netns/{name}", "true"]
        return subprocess.run(entered, capture_output=True, check=False).returncode == 0
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@dataclass
class Network:
    """Where each process runs. Places are `server`, `SITE` for a site's node and `SITE-worker`.

    Fields: sites, their names; apart, whether places are namespaces of their own.
    """

    sites: Sequence[str]
    apart: bool
    _names: dict[str, str] = field(default_factory=dict)

    def make(self) -> None:
        """Make namespaces and links, unless all is one host."""
        if not self.apart:
            return
        for place in self._places():
            self._names[place] = f"fs{os.getpid()}-{len(self._names)}"
            _ip("netns", "add", self._names[place])
            _ip("-n", self._names[place], "link", "set", "lo", "up")
            # Nobody is a router: a worker cannot reach the server through its node, nor a site another site.
            subprocess.run([*self.inside(place), sys.executable, "-c", NO_ROUTER], check=True)
        _ip("-n", self._names[SERVER], "addr", "add", f"{SERVER_ADDRESS}/32", "dev", "lo")
        for number, site in enumerate(self.sites, start=1):
            self._link(f"c{number}", SERVER, f"10.77.{number}.1", "outer", site, f"10.77.{number}.2")
            self._link("inner", site, f"10.78.{number}.1", "node", f"{site}-worker", f"10.78.{number}.2")
            _ip("-n", self._names[site], "route", "add", SERVER_ADDRESS, "via", f"10.77.{number}.1")

    def remove(self) -> None:
        """Remove the namespaces, and their links with them."""
        for name in self._names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._names.clear()

    def inside(self, place: str) -> list[str]:
        """What a command begins with to run at a place."""
        return ["nsenter", f"--net=/run/netns/{self._names[place]}"] if self.apart else []

    def namespace(self, place: str) -> str:
        """The name of a place's namespace, empty if all is one host."""
        return self._names.get(place, "")

    @property
    def server(self) -> str:
        """The server's address, as sites reach it."""
        return SERVER_ADDRESS if self.apart else "127.0.0.1"

    def node(self, site: str) -> str:
        """The address at which a site's worker reaches its node."""
        return f"10.78.{1 + list(self.sites).index(site)}.1" if self.apart else "127.0.0.1"

    def cut(self, site: str) -> None:
        """Pull a site's cable."""
        _ip("-n", self._names[site], "link", "set", "outer", "down")

    def heal(self, site: str) -> None:
        """Plug it in again."""
        _ip("-n", self._names[site], "link", "set", "outer", "up")
        _ip("-n", self._names[site], "route", "replace", SERVER_ADDRESS, "via", self._gateway(site))

    def bytes_out(self, site: str) -> int:
        """All bytes that have left a site towards the server, with every header."""
        told = subprocess.run(
            ["ip", "-n", self._names[site], "-json", "-stats", "link", "show", "outer"],
            capture_output=True,
            check=True,
        )
        return int(json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"])

    def reaches(self, place: str, address: str) -> bool:
        """Whether a TCP connection can be made from a place to HOST:PORT."""
        host, _, port = address.rpartition(":")
        script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
        command = [*self.inside(place), sys.executable, "-c", script, host, port]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _places(self) -> list[str]:
        return [SERVER, *self.sites, *(f"{site}-worker" for site in self.sites)]

    def _gateway(self, site: str) -> str:
        return f"10.77.{1 + list(self.sites).index(site)}.1"

    def _link(self, end: str, at: str, address: str, other_end: str, other: str, other_address: str) -> None:
        one, two = self._names[at], self._names[other]
        _ip("link", "add", end, "netns", one, "type", "veth", "peer", "name", other_end, "netns", two)
        for name, device, own in ((one, end, address), (two, other_end, other_address)):
            _ip("-n", name, "addr", "add", f"{own}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
