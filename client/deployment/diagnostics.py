"""What keeps a site from taking part, found before a study does: a list of checks, each ok or what to do.

Nothing that is found here is sent anywhere. The checks go from the folder to the network to the images, and
one that fails does not keep the others from being made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fedsigma.client.deployment import diagnostics_local, diagnostics_network
from fedsigma.client.deployment.findings import Finding, Problem
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.site.policy import SitePolicy

__all__ = ["examine"]

LEAST_DISK_GB, LEAST_MEMORY_GB = 2.0, 2.0
PARTS = ("node", "worker")
SECRETS = ("node/node.key", "node/superexec.secret", "worker/superexec.secret", "worker/identity.pem")


def examine(
    path: Path, *, offline: bool = False, deep: bool = True, only: str | None = None
) -> Iterator[Finding]:
    """Make all checks of a site, one after the other.

    Args:
        path: of the site's folder.
        offline: leave out what needs the server.
        deep: also load the backbones, read every picture and train a step on three.
        only: `node` or `worker`, to check what that one needs and sees; None for both.
    """
    try:
        site = SiteHome(path)
    except ValueError as error:
        yield Finding("folder", False, str(error), "fedsigma site enrol INVITATION --folder FOLDER")
        return
    yield Finding("folder", True, f"site '{site.connection.site}' of {site.connection.server_name}")
    policy: SitePolicy | None = None
    if only != "node":
        try:
            policy = site.policy()
            yield Finding(
                "site.yaml", True, f"{len(policy.studies)} studies, {len(policy.bundles)} bundles allowed"
            )
        except ValueError as error:
            todo = "correct site.yaml; docs/federation.md lists its keys"
            yield Finding("site.yaml", False, str(error), todo)
    parts = PARTS if only is None else (only,)
    yield from _made({"secrets": lambda: _secrets(site, parts), "disk": lambda: _disk(site.path / parts[-1])})
    yield from _made({"memory": _memory})
    if not offline and "node" in parts:
        yield from _made(diagnostics_network.checks(site), needed="connection")
    own = diagnostics_network.own_checks(site)
    yield from _made({name: check for name, check in own.items() if name in parts})
    if policy is not None and deep:
        yield from _made(diagnostics_local.checks(site, policy))


def _made(checks: dict[str, Callable[[], str]], *, needed: str = "") -> Iterator[Finding]:
    """Make checks; those after a failed `needed` one would only say the same again, and are left out."""
    for name, check in checks.items():
        try:
            yield Finding(name, True, check())
        except Problem as problem:
            yield Finding(name, False, problem.what, problem.todo)
            if name == needed:
                return
        except Exception as error:
            # A check must not end the list; what it ran into is a finding, too.
            yield Finding(name, False, f"{type(error).__name__}: {error}", "see the message")


def _secrets(site: SiteHome, parts: tuple[str, ...]) -> str:
    for name in (name for name in SECRETS if name.split("/")[0] in parts):
        file = site.path / name
        if not file.is_file():
            raise Problem(f"{name} is missing", "put it back from a backup, or enrol anew")
        # Kubernetes mounts a secret as root's, to be read by the container's group; that is as it should be.
        mounted = file.stat().st_uid == 0 != os.getuid()
        if file.stat().st_mode & (0o037 if mounted else 0o077):
            raise Problem(f"{name} can be read by others", f"chmod 600 {file}")
    if (
        parts == PARTS
        and (site.path / "node/superexec.secret").read_bytes()
        != (site.path / "worker/superexec.secret").read_bytes()
    ):
        raise Problem("node and worker have different secrets", "copy node/superexec.secret to worker/")
    return "all there, readable by their owner alone"


def _disk(path: Path) -> str:
    free = shutil.disk_usage(path).free / 1e9
    if free < LEAST_DISK_GB:
        raise Problem(f"{free:.1f} GB free", f"make room: {LEAST_DISK_GB:g} GB at least")
    return f"{free:.0f} GB free"


def _memory() -> str:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6
    if available < LEAST_MEMORY_GB:
        raise Problem(f"{available:.1f} GB available", f"free {LEAST_MEMORY_GB:g} GB for the backbone")
    return f"{available:.1f} GB available"
