"""The doctor's checks of certificates, the way to the centre, clocks, and Flower's processes."""

from __future__ import annotations

import datetime
import email.utils
import ssl
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import httpx
from cryptography import x509

from fedsigma.client.deployment.findings import Problem
from fedsigma.client.deployment.home import SiteFolder
from fedsigma.client.deployment.node_status import Standing, standing_of
from fedsigma.common.ops.health import SERVING, health_of

__all__ = ["checks", "own_checks"]

TIMEOUT_S = 10.0
SOON = datetime.timedelta(days=30)
# Flower refuses a node whose clock is more than 5 s ahead or 305 s behind; dates come in whole seconds.
MOST_AHEAD_S, MOST_BEHIND_S = 3.0, 240.0


def checks(site: SiteFolder) -> dict[str, Callable[[], str]]:
    """What needs the centre, in the order in which one depends on the other."""
    return {
        "certificates": lambda: _certificates(site),
        "connection": lambda: _connection(site),
        "path": lambda: _path(site),
        "clock": lambda: _clock(site),
        "centre": lambda: _centre(site),
        "key": lambda: _key(site),
    }


def own_checks(site: SiteFolder) -> dict[str, Callable[[], str]]:
    """The site's own two processes."""
    connection = site.connection
    return {
        "node": lambda: _process(connection.node_health, "node"),
        "worker": lambda: _process(connection.worker_health, "worker"),
    }


def _certificates(site: SiteFolder) -> str:
    file = site.path / "node" / "sites.crt"
    found = x509.load_pem_x509_certificates(file.read_bytes())
    end = max(one.not_valid_after_utc for one in found)
    now = datetime.datetime.now(datetime.UTC)
    if end <= now:
        raise Problem(
            f"what this site trusts expired on {end:%Y-%m-%d}", "ask the centre for its new certificate"
        )
    if end - now < SOON:
        raise Problem(
            f"what this site trusts expires on {end:%Y-%m-%d}", "ask the centre for its new certificate"
        )
    return f"trusted until {end:%Y-%m-%d}"


def _connection(site: SiteFolder) -> str:
    try:
        answer = _get(site, "/")
    except httpx.ConnectError as error:
        if "CERTIFICATE" in str(error).upper():
            raise Problem(
                f"the certificate of {site.connection.server} is not one that this site trusts: {error}",
                "if a firewall opens TLS here, have it leave this address out; else ask the centre",
            ) from None
        raise Problem(
            f"{site.connection.server} cannot be reached: {error}",
            "have the firewall allow outbound TCP to this address and port; HTTPS_PROXY names a proxy",
        ) from None
    except httpx.TimeoutException:
        raise Problem(
            f"{site.connection.server} did not answer in {TIMEOUT_S:g} s",
            "have the firewall allow outbound TCP to this address and port; HTTPS_PROXY names a proxy",
        ) from None
    return f"{site.connection.server} answers over TLS ({answer.http_version})"


def _path(site: SiteFolder) -> str:
    fleet = _post(site, "/v1/fleet/pull-messages").status_code
    if fleet in (404, 502, 503, 504):
        raise Problem(
            f"the Fleet path answers {fleet}", "the centre's SuperLink is down, or its proxy is not ours"
        )
    control = _post(site, "/v1/control/list-runs").status_code
    if control != 404:
        raise Problem(
            f"the centre's Control path is open ({control}): whoever reaches it can start code here",
            "stop the node (fedsigma site down), and tell the centre",
        )
    return "the Fleet path is open, and the Control path is not"


def _clock(site: SiteFolder) -> str:
    text = _get(site, "/").headers.get("date", "")
    if not text:
        raise Problem("the centre's answer has no date", "compare the clocks by hand")
    ahead = (datetime.datetime.now(datetime.UTC) - email.utils.parsedate_to_datetime(text)).total_seconds()
    # The date is cut to the second, so up to one second ahead is none.
    ahead -= 0.5
    if ahead > MOST_AHEAD_S or ahead < -MOST_BEHIND_S:
        where = "ahead of" if ahead > 0 else "behind"
        raise Problem(
            f"this clock is {abs(ahead):.0f} s {where} the centre's", "set it by NTP: Flower refuses the node"
        )
    return f"{abs(ahead):.0f} s from the centre's"


def _centre(site: SiteFolder) -> str:
    health = health_of(
        site.connection.server,
        timeout_s=TIMEOUT_S,
        certificates=(site.path / "node" / "sites.crt").read_bytes(),
    )
    if health != SERVING:
        raise Problem(f"the SuperLink's health: {health}", "ask the centre: fedsigma server status")
    return "the SuperLink is serving"


def _key(site: SiteFolder) -> str:
    node = site.path / "node"
    standing = standing_of(site.connection.server, node / "node.key", node / "sites.crt")
    if standing is Standing.SIGNATURE_REFUSED:
        raise Problem("the centre does not take this node's signature", "look at the clock; else enrol anew")
    if standing is Standing.NOT_LET_IN:
        raise Problem(
            "the centre does not let this node's key in: it was not admitted yet, or is shut out",
            "send the file of keys to the centre (fedsigma server admit), or ask it why",
        )
    return "the centre lets this node in"


def _process(address: str, name: str) -> str:
    if not address:
        return "no health service in connection.yaml"
    health = health_of(address)
    if health != SERVING:
        raise Problem(f"{name}: {health}", f"fedsigma site up, and look at logs/{name}.log")
    return "serving"


def _get(site: SiteFolder, path: str) -> httpx.Response:
    return _client(site.path / "node" / "sites.crt").get(f"https://{site.connection.server}{path}")


def _post(site: SiteFolder, path: str) -> httpx.Response:
    return _client(site.path / "node" / "sites.crt").post(f"https://{site.connection.server}{path}")


@lru_cache(maxsize=2)
def _client(trust: Path) -> httpx.Client:
    return httpx.Client(verify=ssl.create_default_context(cafile=str(trust)), timeout=TIMEOUT_S)
