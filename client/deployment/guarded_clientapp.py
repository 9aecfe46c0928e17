"""The worker's ClientApp process: Flower's `flwr-clientapp`, for approved bundles only.

Flower installs and runs any bundle that the server names. Here the bundle's SHA-256 must be in site.yaml; any
other is stored for review and answered with an error. For every error outside FedSigma's own code, the server
receives its type only, because its text may contain paths.
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
    """Run one ClientApp; the environment variable FEDSIGMA_SITE names site.yaml."""
    from fedsigma.common.ops.flower_compat import clientapp_module, flwr_clientapp

    flower = clientapp_module()  # its functions are replaced in this process only
    site_yaml = Path(os.environ["FEDSIGMA_SITE"])
    install, push_output, error = flower.install_from_fab, flower.push_task_output, flower.Error

    def install_approved(bundle: bytes, *args: Any, **options: Any) -> Any:
        check_bundle(bundle, site_yaml)
        return install(bundle, *args, **options)

    def push_redacted(*args: Any, **options: Any) -> Any:
        if options.get("details"):
            options["details"] = _error_type(str(options["details"]))
        return push_output(*args, **options)

    def redacted_error(code: int, reason: str | None = None) -> Any:
        return error(code, _error_type(reason or ""))

    flower.install_from_fab = install_approved  # type: ignore[attr-defined]
    flower.push_task_output = push_redacted  # type: ignore[attr-defined]
    flower.Error = redacted_error  # type: ignore[attr-defined]
    flwr_clientapp()


def check_bundle(bundle: bytes, site_yaml: Path) -> None:
    """Reject a bundle that the site has not approved: store it for review, and log the rejection.

    Raises:
        BundleNotApproved: The bundle's digest is not in site.yaml.
    """
    from fedsigma.client.deployment.bundle_approval import BundleApprovals, bundle_digest
    from fedsigma.client.site.audit_log import log_reply
    from fedsigma.client.site.policy import SitePolicy

    policy, digest = SitePolicy.read(site_yaml), bundle_digest(bundle)
    if digest in policy.bundles:
        return
    BundleApprovals(site_yaml.parent).add_pending(bundle)
    audit_path = site_yaml.parent / Path(policy.audit).expanduser()
    log_reply(audit_path, {"message": "bundle", "bundle": digest}, {"error": BundleNotApproved.__name__})
    print(
        f"FedSigma: bundle {digest} is not approved: review it with `fedsigma site approve`", file=sys.stderr
    )
    raise BundleNotApproved(digest)


def _error_type(reason: str) -> str:
    """Return the type's name of an error that Flower describes as <class 'module.Name'>:<'text'>."""
    match = re.match(r"<class '(?:\w+\.)*(\w+)'>", reason)
    return match[1] if match else "ClientAppError"


if __name__ == "__main__":
    main()
