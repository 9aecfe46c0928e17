"""What a site's worker runs instead of `flwr-clientapp`: the same, for approved bundles only.

Flower installs and runs whatever bundle the server names. Here the bundle's SHA-256 must be in site.yaml;
any other is kept for people to look at and answered with an error. And whatever else fails before or outside
FedSigma's own code, the server learns the kind of the error and never its text, which may hold paths.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["BundleNotApproved", "check_bundle", "main"]


class BundleNotApproved(FedSigmaError, PermissionError):
    """The bundle's digest is not in site.yaml."""


def main() -> None:
    """Run one ClientApp under guard; the environment variable FEDSIGMA_SITE names site.yaml."""
    from fedsigma.common.ops.flower_compat import clientapp_module, flwr_clientapp

    flower = clientapp_module()  # its functions are replaced in this process only
    site_yaml = Path(os.environ["FEDSIGMA_SITE"])
    install, push_output, error = flower.install_from_fab, flower.push_task_output, flower.Error

    def guarded(bundle: bytes, *args: Any, **options: Any) -> Any:
        check_bundle(bundle, site_yaml)
        return install(bundle, *args, **options)

    def quiet_output(*args: Any, **options: Any) -> Any:
        if options.get("details"):
            options["details"] = _kind(str(options["details"]))
        return push_output(*args, **options)

    def quiet_error(code: int, reason: str | None = None) -> Any:
        return error(code, _kind(reason or ""))

    flower.install_from_fab = guarded  # type: ignore[attr-defined]
    flower.push_task_output = quiet_output  # type: ignore[attr-defined]
    flower.Error = quiet_error  # type: ignore[attr-defined]
    flwr_clientapp()


def check_bundle(bundle: bytes, site_yaml: Path) -> None:
    """Refuse a bundle that the site has not approved: keep it, and write that down.

    Raises:
        BundleNotApproved: its digest is not in site.yaml.
    """
    from fedsigma.client.deployment.bundle_approval import BundleApprovals, bundle_digest
    from fedsigma.client.site.audit_log import AuditLog
    from fedsigma.client.site.policy import SitePolicy

    policy, digest = SitePolicy.read(site_yaml), bundle_digest(bundle)
    if digest in policy.bundles:
        return
    BundleApprovals(site_yaml.parent).add_pending(bundle)
    log = AuditLog(site_yaml.parent / Path(policy.audit).expanduser())
    log.record({"message": "bundle", "bundle": digest}, {"error": BundleNotApproved.__name__})
    print(
        f"FedSigma: bundle {digest} is not approved here: `fedsigma site approve` shows it", file=sys.stderr
    )
    raise BundleNotApproved(digest)


def _kind(reason: str) -> str:
    """The type's name of an error that Flower describes as <class 'module.Name'>:<'text'>."""
    found = re.match(r"<class '(?:\w+\.)*(\w+)'>", reason)
    return found[1] if found else "ClientAppError"


if __name__ == "__main__":
    main()
