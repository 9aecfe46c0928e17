"""Whether a process is alive: a Flower process by gRPC's own health service, a web server by its /health."""

from __future__ import annotations

import http.client
import ssl

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

__all__ = ["SERVING", "health_of", "web_health_of"]

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


def web_health_of(address: str, *, timeout_s: float = 5.0, certificate: bytes | None = None) -> str:
    """Ask a web server for its health, by GET /health.

    Args:
        address: HOST:PORT.
        timeout_s: how long to wait, in seconds.
        certificate: PEM of the certificate that it has to have, what follows in the file left out; None for a
            connection without TLS.

    Returns:
        `SERVING`, or in a few words why not; never raises for a server that does not answer.

    Raises:
        ValueError: the certificate is none.
    """
    host, _, port = address.rpartition(":")
    # Not by urllib: it would ask a proxy that the environment names.
    connection = (
        http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        if certificate is None
        else http.client.HTTPSConnection(host, int(port), timeout=timeout_s, context=_only(certificate))
    )
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        return f"no answer ({error.verify_message})"
    except (OSError, http.client.HTTPException) as error:
        words = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        return f"no answer ({str(words).lower().replace('_', ' ')})"
    finally:
        connection.close()
    return SERVING if status == http.client.OK else f"answers {status}"


def _only(certificate: bytes) -> ssl.SSLContext:
    """Trust in this very certificate, whoever signed it and whatever names it is for."""
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509 import load_pem_x509_certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=load_pem_x509_certificate(certificate).public_bytes(Encoding.DER))
    return context
