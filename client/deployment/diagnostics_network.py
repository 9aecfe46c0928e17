"""Checks of a site's certificates, its connection to the server, its clock and its two processes."""

from __future__ import annotations

import datetime
import email.utils
import ssl
from collections.abc import Callable
from functools import partial

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsigma.client.deployment.findings import CheckFailed
from fedsigma.client.deployment.home import SiteHome
from fedsigma.common.ops.health import SERVING, check_health
from fedsigma.common.utils.errors import InputError

__all__ = ["process_checks", "server_checks"]

TIMEOUT_S = 10.0
EXPIRY_WARNING = datetime.timedelta(days=30)
# Flower rejects a node whose clock is more than 5 s ahead or 305 s behind; dates have whole seconds.
MAX_AHEAD_S, MAX_BEHIND_S = 3.0, 240.0
FIREWALL = "have the firewall allow outbound TCP to this address and port; HTTPS_PROXY names a proxy"


def server_checks(site: SiteHome) -> dict[str, Callable[[], str]]:
    """Return the checks that need the server; a later one depends on the earlier ones."""
    checks: dict[str, Callable[[SiteHome], str]] = {
        "certificates": _check_certificates,
        "connection": _check_connection,
        "path": _check_paths,
        "clock": _check_clock,
        "server": _check_server,
        "key": _check_key,
    }
    return {name: partial(check, site) for name, check in checks.items()}


def process_checks(site: SiteHome, parts: tuple[str, ...]) -> dict[str, Callable[[], str]]:
    """Return the checks of the node, the worker, or both."""
    return {part: partial(_check_process, getattr(site.connection, f"{part}_health"), part) for part in parts}


def _check_certificates(site: SiteHome) -> str:
    certificates = x509.load_pem_x509_certificates((site.path / "node" / "sites.crt").read_bytes())
    end = max(certificate.not_valid_after_utc for certificate in certificates)
    now = datetime.datetime.now(datetime.UTC)
    if end - now < EXPIRY_WARNING:
        when = f"{'expired' if end <= now else 'expires'} on {end:%Y-%m-%d}"
        raise CheckFailed(
            f"the certificate that this site trusts {when}", "ask the server for its new certificate"
        )
    return f"trusted until {end:%Y-%m-%d}"


def _check_connection(site: SiteHome) -> str:
    address = site.connection.address
    try:
        response = _request(site, "GET", "/")
    except httpx.ConnectError as error:
        if "CERTIFICATE" in str(error).upper():
            raise CheckFailed(
                f"the certificate of {address} is not one that this site trusts: {error}",
                "if a firewall decrypts TLS, exclude this address from it; else ask the server",
            ) from None
        raise CheckFailed(f"{address} cannot be reached: {error}", FIREWALL) from None
    except httpx.TimeoutException:
        raise CheckFailed(f"{address} did not respond within {TIMEOUT_S:g} s", FIREWALL) from None
    return f"{address} responds over TLS ({response.http_version})"


def _check_paths(site: SiteHome) -> str:
    fleet = _request(site, "POST", "/v1/fleet/pull-messages").status_code
    if fleet in (404, 502, 503, 504):
        remedy = "the server's SuperLink is down, or its proxy is not FedSigma's"
        raise CheckFailed(f"the Fleet path answers {fleet}", remedy)
    control = _request(site, "POST", "/v1/control/list-runs").status_code
    if control != 404:
        raise CheckFailed(
            f"the server's Control path is open ({control}): anyone who reaches it can start code here",
            "stop the node (fedsigma site down), and inform the server",
        )
    return "the Fleet path is open, and the Control path is not"


def _check_clock(site: SiteHome) -> str:
    date = _request(site, "GET", "/").headers.get("date", "")
    if not date:
        raise CheckFailed("the server's response has no date", "compare the clocks by hand")
    ahead = (datetime.datetime.now(datetime.UTC) - email.utils.parsedate_to_datetime(date)).total_seconds()
    ahead -= 0.5  # the mean of what the date lacks
    if ahead > MAX_AHEAD_S or ahead < -MAX_BEHIND_S:
        direction = "ahead of" if ahead > 0 else "behind"
        raise CheckFailed(
            f"this clock is {abs(ahead):.0f} s {direction} the server's",
            "set it by NTP: Flower rejects the node",
        )
    return f"{abs(ahead):.0f} s from the server's"


def _check_server(site: SiteHome) -> str:
    certificates = (site.path / "node" / "sites.crt").read_bytes()
    health = check_health(site.connection.address, timeout_s=TIMEOUT_S, certificates=certificates)
    if health != SERVING:
        raise CheckFailed(f"the SuperLink's health: {health}", "ask the server: fedsigma server status")
    return "the SuperLink is serving"


def _check_key(site: SiteHome) -> str:
    """Ask the SuperLink to activate the node with a heartbeat of zero seconds.

    It verifies the signature and its time (401), then that the key is admitted (412), and last the
    heartbeat, which it rejects (400), so that nothing changes.
    """
    from fedsigma.common.ops import flower_compat

    folder = site.path / "node"
    private = load_ssh_private_key((folder / "node.key").read_bytes(), password=None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise InputError(f"{folder / 'node.key'} holds no ECDSA key")
    public = private.public_key()
    client = flower_compat.FleetHttpClient.from_server_address(
        site.connection.address,
        False,
        (folder / "sites.crt").read_bytes(),
        interceptors=[flower_compat.NodeAuthHttpInterceptor(private, public)],
    )
    request = flower_compat.ActivateNodeRequest(
        public_key=flower_compat.public_key_to_bytes(public), heartbeat_interval=0
    )
    try:
        client.ActivateNode(request)
    except httpx.HTTPStatusError as error:
        match error.response.status_code:
            case 401:
                raise CheckFailed(
                    "the server rejects this node's signature", "check the clock; else enrol again"
                ) from None
            case 412:
                raise CheckFailed(
                    "the server does not admit this node's key: it is not admitted yet, or was revoked",
                    "send the key file to the server (fedsigma server admit), or ask for the reason",
                ) from None
            case 400:
                pass
            case _:
                raise
    finally:
        client.close()
    return "the server admits this node"


def _check_process(address: str, name: str) -> str:
    if not address:
        return "no health service in connection.yaml"
    health = check_health(address)
    if health != SERVING:
        raise CheckFailed(f"{name}: {health}", f"fedsigma site up, and check logs/{name}.log")
    return "serving"


def _request(site: SiteHome, method: str, path: str) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(site.path / "node" / "sites.crt"))
    return httpx.request(
        method, f"https://{site.connection.address}{path}", verify=context, timeout=TIMEOUT_S
    )
