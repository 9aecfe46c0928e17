"""What a site does with Flower's own modules besides running its programs; Flower may move these monthly."""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

__all__ = ["signature_taken"]

UNAUTHORIZED = 401


def signature_taken(server: str, key: Path, trust: Path) -> bool:
    """Whether a SuperLink takes what this node signs: the kind of key, and the clock in the signature.

    Asks to register the node, which a SuperLink with authenticated nodes refuses on principle, after it has
    looked at the signature. So nothing changes there.

    Raises:
        httpx.HTTPError: it does not answer.
        ValueError: the key is no key of a node.
    """
    from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = load_ssh_private_key(key.read_bytes(), password=None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError(f"{key} holds no ECDSA key")
    public = private.public_key()
    client = FleetHttpClient.from_server_address(
        server, False, trust.read_bytes(), interceptors=[NodeAuthHttpInterceptor(private, public)]
    )
    try:
        client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key_to_bytes(public)))
    except httpx.HTTPStatusError as error:
        return error.response.status_code != UNAUTHORIZED
    finally:
        client.close()
    return True
