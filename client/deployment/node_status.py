"""Ask a SuperLink whether it accepts a node's key."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedsigma.common.utils.errors import InputError

__all__ = ["NodeStatus", "node_status"]


class NodeStatus(Enum):
    """How a SuperLink takes a node's key."""

    ADMITTED = "let in"
    NOT_ADMITTED = "not let in"
    SIGNATURE_INVALID = "signature refused"


_MEANING = {400: NodeStatus.ADMITTED, 401: NodeStatus.SIGNATURE_INVALID, 412: NodeStatus.NOT_ADMITTED}


def node_status(server: str, key: Path, trust: Path) -> NodeStatus:
    """Ask a SuperLink how it takes a node's key; nothing changes there.

    Asks to activate the node with a heartbeat of zero seconds. The SuperLink looks at the signature and at
    its clock, then for the key among those that are let in, and last at the heartbeat, which it refuses.

    Raises:
        httpx.HTTPError: it does not answer, or in another way.
        ValueError: the key is no key of a node.
    """
    from fedsigma.common.ops.flower_compat import (
        ActivateNodeRequest,
        FleetHttpClient,
        NodeAuthHttpInterceptor,
        public_key_to_bytes,
    )

    private = load_ssh_private_key(key.read_bytes(), password=None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise InputError(f"{key} holds no ECDSA key")
    public = private.public_key()
    client = FleetHttpClient.from_server_address(
        server, False, trust.read_bytes(), interceptors=[NodeAuthHttpInterceptor(private, public)]
    )
    try:
        client.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0))
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in _MEANING:
            raise
        return _MEANING[error.response.status_code]
    finally:
        client.close()
    return NodeStatus.ADMITTED
