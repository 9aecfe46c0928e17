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
from fedsigma.client.deployment.findings import CheckFailed, CheckResult
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.site.policy import SitePolicy

__all__ = ["run_checks"]

MIN_DISK_GB, MIN_MEMORY_GB = 2.0, 2.0
PARTS = ("node", "worker")
SECRETS = ("node/node.key", "node/superexec.secret", "worker/superexec.secret", "worker/identity.pem")


def run_checks(
    path: Path, *, offline: bool = False, deep: bool = True, only: str | None = None
) -> Iterator[CheckResult]:
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
        yield CheckResult("folder", False, str(error), "fedsigma site enrol INVITATION --folder FOLDER")
        return
    yield CheckResult("folder", True, f"site '{site.connection.site}' of {site.connection.server_name}")
    policy: SitePolicy | None = None
    if only != "node":
        try:
            policy = site.read_policy()
            yield CheckResult(
                "site.yaml", True, f"{len(policy.studies)} studies, {len(policy.bundles)} bundles allowed"
            )
        except ValueError as error:
            todo = "correct site.yaml; docs/federation.md lists its keys"
            yield CheckResult("site.yaml", False, str(error), todo)
    parts = PARTS if only is None else (only,)
    yield from _run({"secrets": lambda: _secrets(site, parts), "disk": lambda: _disk(site.path / parts[-1])})
    yield from _run({"memory": _memory})
    if not offline and "node" in parts:
        yield from _run(diagnostics_network.server_checks(site), required="connection")
    own = diagnostics_network.process_checks(site)
    yield from _run({name: check for name, check in own.items() if name in parts})
    if policy is not None and deep:
        yield from _run(diagnostics_local.data_checks(site, policy))


def _run(checks: dict[str, Callable[[], str]], *, required: str = "") -> Iterator[CheckResult]:
    """Make checks; those after a failed `needed` one would only say the same again, and are left out."""
    for name, check in checks.items():
        try:
            yield CheckResult(name, True, check())
        except CheckFailed as problem:
            yield CheckResult(name, False, problem.detail, problem.remedy)
            if name == required:
                return
        except Exception as error:
            # A check must not end the list; what it ran into is a finding, too.
            yield CheckResult(name, False, f"{type(error).__name__}: {error}", "see the message")


def _secrets(site: SiteHome, parts: tuple[str, ...]) -> str:
    for name in (name for name in SECRETS if name.split("/")[0] in parts):
        file = site.path / name
        if not file.is_file():
            raise CheckFailed(f"{name} is missing", "put it back from a backup, or enrol anew")
        # Kubernetes mounts a secret as root's, to be read by the container's group; that is as it should be.
        mounted = file.stat().st_uid == 0 != os.getuid()
        if file.stat().st_mode & (0o037 if mounted else 0o077):
            raise CheckFailed(f"{name} can be read by others", f"chmod 600 {file}")
    if (
        parts == PARTS
        and (site.path / "node/superexec.secret").read_bytes()
        != (site.path / "worker/superexec.secret").read_bytes()
    ):
        raise CheckFailed("node and worker have different secrets", "copy node/superexec.secret to worker/")
    return "all there, readable by their owner alone"


def _disk(path: Path) -> str:
    free = shutil.disk_usage(path).free / 1e9
    if free < MIN_DISK_GB:
        raise CheckFailed(f"{free:.1f} GB free", f"make room: {MIN_DISK_GB:g} GB at least")
    return f"{free:.0f} GB free"


def _memory() -> str:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6
    if available < MIN_MEMORY_GB:
        raise CheckFailed(f"{available:.1f} GB available", f"free {MIN_MEMORY_GB:g} GB for the backbone")
    return f"{available:.1f} GB available"
