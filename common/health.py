"""Whether a Flower process is alive, by gRPC's own health service."""

from __future__ import annotations

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

__all__ = ["SERVING", "health_of"]

SERVING = "serving"


def health_of(
    address: str, *, timeout_s: float = 5.0, certificates: bytes | None = None, name: str = ""
) -> str:
    """Ask a process for its health.

    Args:
        address: HOST:PORT of its health service, or of a proxy in front of it.
        timeout_s: how long to wait, in seconds.
        certificates: PEM of the authorities to trust; None for a connection without TLS, on this machine.
        name: whose certificate it has to be, where that is not the address's host.

    Returns:
        `SERVING`, or in a few words why not; never raises for a process that does not answer.
    """
    channel = (
        grpc.insecure_channel(address)
        if certificates is None
        else grpc.secure_channel(
            address,
            grpc.ssl_channel_credentials(certificates),
            options=[("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
            if name
            else [],
        )
    )
    with channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            return f"no answer ({code.name.lower().replace('_', ' ') if code else 'unknown'})"
    return HealthCheckResponse.ServingStatus.Name(answer.status).lower().replace("_", " ")
