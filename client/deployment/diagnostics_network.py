"""The doctor's checks of certificates, the way to the server, clocks, and Flower's processes."""

from __future__ import annotations

import datetime
import email.utils
import ssl
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import httpx
from cryptography import x509

from fedsigma.client.deployment.findings import CheckFailed
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.deployment.node_status import NodeStatus, node_status
from fedsigma.common.ops.health import SERVING, check_health

__all__ = ["process_checks", "server_checks"]

TIMEOUT_S = 10.0
EXPIRY_WARNING = datetime.timedelta(days=30)
# Flower refuses a node whose clock is more than 5 s ahead or 305 s behind; dates come in whole seconds.
MAX_AHEAD_S, MAX_BEHIND_S = 3.0, 240.0


def server_checks(site: SiteHome) -> dict[str, Callable[[], str]]:
    """What needs the server, in the order in which one depends on the other."""
    return {
        "certificates": lambda: _certificates(site),
        "connection": lambda: _connection(site),
        "path": lambda: _path(site),
        "clock": lambda: _clock(site),
        "server": lambda: _server(site),
        "key": lambda: _key(site),
    }


def process_checks(site: SiteHome) -> dict[str, Callable[[], str]]:
    """The site's own two processes."""
    connection = site.connection
    return {
        "node": lambda: _process(connection.node_health, "node"),
        "worker": lambda: _process(connection.worker_health, "worker"),
    }


def _certificates(site: SiteHome) -> str:
    file = site.path / "node" / "sites.crt"
    found = x509.load_pem_x509_certificates(file.read_bytes())
    end = max(one.not_valid_after_utc for one in found)
    now = datetime.datetime.now(datetime.UTC)
    if end <= now:
        raise CheckFailed(
            f"what this site trusts expired on {end:%Y-%m-%d}", "ask the server for its new certificate"
        )
    if end - now < EXPIRY_WARNING:
        raise CheckFailed(
            f"what this site trusts expires on {end:%Y-%m-%d}", "ask the server for its new certificate"
        )
    return f"trusted until {end:%Y-%m-%d}"


def _connection(site: SiteHome) -> str:
    try:
        answer = _get(site, "/")
    except httpx.ConnectError as error:
        if "CERTIFICATE" in str(error).upper():
            raise CheckFailed(
                f"the certificate of {site.connection.address} is not one that this site trusts: {error}",
                "if a firewall opens TLS here, have it leave this address out; else ask the server",
            ) from None
        raise CheckFailed(
            f"{site.connection.address} cannot be reached: {error}",
            "have the firewall allow outbound TCP to this address and port; HTTPS_PROXY names a proxy",
        ) from None
    except httpx.TimeoutException:
        raise CheckFailed(
            f"{site.connection.address} did not answer in {TIMEOUT_S:g} s",
            "have the firewall allow outbound TCP to this address and port; HTTPS_PROXY names a proxy",
        ) from None
    return f"{site.connection.address} answers over TLS ({answer.http_version})"


def _path(site: SiteHome) -> str:
    fleet = _post(site, "/v1/fleet/pull-messages").status_code
    if fleet in (404, 502, 503, 504):
        raise CheckFailed(
            f"the Fleet path answers {fleet}", "the server's SuperLink is down, or its proxy is not ours"
        )
    control = _post(site, "/v1/control/list-runs").status_code
    if control != 404:
        raise CheckFailed(
            f"the server's Control path is open ({control}): whoever reaches it can start code here",
            "stop the node (fedsigma site down), and tell the server",
        )
    return "the Fleet path is open, and the Control path is not"


def _clock(site: SiteHome) -> str:
    text = _get(site, "/").headers.get("date", "")
    if not text:
        raise CheckFailed("the server's answer has no date", "compare the clocks by hand")
    ahead = (datetime.datetime.now(datetime.UTC) - email.utils.parsedate_to_datetime(text)).total_seconds()
    # The date is cut to the second, so up to one second ahead is none.
    ahead -= 0.5
    if ahead > MAX_AHEAD_S or ahead < -MAX_BEHIND_S:
        where = "ahead of" if ahead > 0 else "behind"
        raise CheckFailed(
            f"this clock is {abs(ahead):.0f} s {where} the server's", "set it by NTP: Flower refuses the node"
        )
    return f"{abs(ahead):.0f} s from the server's"


def _server(site: SiteHome) -> str:
    health = check_health(
        site.connection.address,
        timeout_s=TIMEOUT_S,
        certificates=(site.path / "node" / "sites.crt").read_bytes(),
    )
    if health != SERVING:
        raise CheckFailed(f"the SuperLink's health: {health}", "ask the server: fedsigma server status")
    return "the SuperLink is serving"


def _key(site: SiteHome) -> str:
    node = site.path / "node"
    standing = node_status(site.connection.address, node / "node.key", node / "sites.crt")
    if standing is NodeStatus.SIGNATURE_INVALID:
        raise CheckFailed(
            "the server does not take this node's signature", "look at the clock; else enrol anew"
        )
    if standing is NodeStatus.NOT_ADMITTED:
        raise CheckFailed(
            "the server does not let this node's key in: it was not admitted yet, or is shut out",
            "send the file of keys to the server (fedsigma server admit), or ask it why",
        )
    return "the server lets this node in"


def _process(address: str, name: str) -> str:
    if not address:
        return "no health service in connection.yaml"
    health = check_health(address)
    if health != SERVING:
        raise CheckFailed(f"{name}: {health}", f"fedsigma site up, and look at logs/{name}.log")
    return "serving"


def _get(site: SiteHome, path: str) -> httpx.Response:
    return _client(site.path / "node" / "sites.crt").get(f"https://{site.connection.address}{path}")


def _post(site: SiteHome, path: str) -> httpx.Response:
    return _client(site.path / "node" / "sites.crt").post(f"https://{site.connection.address}{path}")


@lru_cache(maxsize=2)
def _client(trust: Path) -> httpx.Client:
    return httpx.Client(verify=ssl.create_default_context(cafile=str(trust)), timeout=TIMEOUT_S)
