"""The health of a process: of a Flower process by gRPC's health service, of a web server by GET /health."""

from __future__ import annotations

import http.client
import ssl

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

__all__ = ["SERVING", "check_health", "check_web_health"]

SERVING = "serving"
TIMEOUT_S = 5.0


def check_health(
    address: str, *, timeout_s: float = TIMEOUT_S, certificates: bytes | None = None, name: str = ""
) -> str:
    """Ask a gRPC health service for its status.

    Args:
        address: HOST:PORT of the service, or of a proxy in front of it.
        timeout_s: Time limit in seconds.
        certificates: PEM certificates of the authorities to trust; None to connect without TLS.
        name: Name in the server's certificate, if it is not the host of `address`.

    Returns:
        `SERVING`, or the reason why not, also for a process that does not answer.
    """
    if certificates is None:
        channel = grpc.insecure_channel(address)
    else:
        options = ("grpc.ssl_target_name_override", "grpc.default_authority") if name else ()
        credentials = grpc.ssl_channel_credentials(certificates)
        channel = grpc.secure_channel(address, credentials, options=[(option, name) for option in options])
    with channel:
        try:
            reply = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "unknown"
            return f"no answer ({_plain(code)})"
    return _plain(HealthCheckResponse.ServingStatus.Name(reply.status))


def check_web_health(address: str, *, certificate: bytes | None = None) -> str:
    """Ask a web server for its status.

    Args:
        address: HOST:PORT.
        certificate: PEM file whose first certificate the server must have; None to connect without TLS.

    Returns:
        `SERVING`, or the reason why not, also for a server that does not answer.

    Raises:
        ValueError: `certificate` cannot be parsed.
    """
    host, _, port = address.rpartition(":")
    # Not by urllib, which would use a proxy of the environment.
    connection = (
        http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
        if certificate is None
        else http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT_S, context=_trust_only(certificate))
    )
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        return f"no answer ({error.verify_message})"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        return f"no answer ({_plain(str(reason))})"
    finally:
        connection.close()
    return SERVING if status == http.client.OK else f"answers {status}"


def _plain(text: str) -> str:
    return text.lower().replace("_", " ")


def _trust_only(certificate: bytes) -> ssl.SSLContext:
    """Return a context that accepts this certificate only, whatever its issuer and names."""
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509 import load_pem_x509_certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=load_pem_x509_certificate(certificate).public_bytes(Encoding.DER))
    return context
