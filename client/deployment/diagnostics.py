"""Checks of a site before a study: its folder, the network, its processes, and its images.

The results are not sent anywhere. A failed check does not prevent the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fedsigma.client.deployment import diagnostics_local, diagnostics_network
from fedsigma.client.deployment.findings import CheckFailed, CheckResult
from fedsigma.client.deployment.home import SiteHome

__all__ = ["run_checks"]

MIN_DISK_GB, MIN_MEMORY_GB = 2.0, 2.0
PARTS = ("node", "worker")
SECRETS = ("node/node.key", "node/superexec.secret", "worker/superexec.secret", "worker/identity.pem")


def run_checks(
    path: Path, *, offline: bool = False, deep: bool = True, only: str | None = None
) -> Iterator[CheckResult]:
    """Run all checks of a site, one after the other.

    Args:
        path: The site's folder.
        offline: Skip the checks that need the server.
        deep: Also load the backbones, read every image and train a step on three.
        only: `node` or `worker`: check that process's requirements only; None for both.
    """
    try:
        site = SiteHome(path)
    except ValueError as error:
        yield CheckResult("folder", False, str(error), "fedsigma site enrol INVITATION --folder FOLDER")
        return
    yield CheckResult("folder", True, f"site '{site.connection.site}' of {site.connection.server_name}")
    policy = None
    if only != "node":
        try:
            policy = site.read_policy()
            detail = f"{len(policy.studies)} studies, {len(policy.bundles)} bundles allowed"
            yield CheckResult("site.yaml", True, detail)
        except ValueError as error:
            remedy = "correct site.yaml; docs/federation.md lists its keys"
            yield CheckResult("site.yaml", False, str(error), remedy)
    parts = PARTS if only is None else (only,)
    disk = partial(_check_disk, site.path / parts[-1])
    yield from _run({"secrets": partial(_check_secrets, site, parts), "disk": disk, "memory": _check_memory})
    if not offline and "node" in parts:
        yield from _run(diagnostics_network.server_checks(site), required="connection")
    yield from _run(diagnostics_network.process_checks(site, parts))
    if policy is not None and deep:
        yield from _run(diagnostics_local.data_checks(site, policy))


def _run(checks: dict[str, Callable[[], str]], *, required: str = "") -> Iterator[CheckResult]:
    """Run checks; if the required one fails, the checks after it are skipped."""
    for name, check in checks.items():
        try:
            yield CheckResult(name, True, check())
        except CheckFailed as failure:
            yield CheckResult(name, False, failure.detail, failure.remedy)
            if name == required:
                return
        except Exception as error:  # an unexpected error is a finding, too
            yield CheckResult(name, False, f"{type(error).__name__}: {error}", "see the message")


def _check_secrets(site: SiteHome, parts: tuple[str, ...]) -> str:
    for name in (name for name in SECRETS if name.split("/")[0] in parts):
        file = site.path / name
        if not file.is_file():
            raise CheckFailed(f"{name} is missing", "restore it from a backup, or enrol again")
        # A secret that Kubernetes mounts belongs to root and is readable by the container's group.
        mounted = file.stat().st_uid == 0 != os.getuid()
        if file.stat().st_mode & (0o037 if mounted else 0o077):
            raise CheckFailed(f"{name} can be read by others", f"chmod 600 {file}")
    if len({(site.path / part / "superexec.secret").read_bytes() for part in parts}) > 1:
        raise CheckFailed("node and worker have different secrets", "copy node/superexec.secret to worker/")
    return "complete, and readable by their owner only"


def _check_disk(path: Path) -> str:
    free = shutil.disk_usage(path).free / 1e9
    if free < MIN_DISK_GB:
        raise CheckFailed(f"{free:.1f} GB free", f"free at least {MIN_DISK_GB:g} GB")
    return f"{free:.0f} GB free"


def _check_memory() -> str:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6
    if available < MIN_MEMORY_GB:
        raise CheckFailed(f"{available:.1f} GB available", f"free {MIN_MEMORY_GB:g} GB for the backbone")
    return f"{available:.1f} GB available"
