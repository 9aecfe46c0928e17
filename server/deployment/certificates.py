"""The server's certificate authority, and the certificates that it issues.

Sites receive the authority's certificate with their invitation and trust no other, so no public authority is
needed, and a server's certificate can be replaced without any change at the sites.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_secret, write_whole

__all__ = ["AuthorityError", "CertificatePair", "check_pair", "create_authority", "issue_certificate"]

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
"""Validity in days: ten years for the authority, and the most that browsers accept for a server."""


class AuthorityError(FedSigmaError, ValueError):
    """The authority's files cannot be used."""


@dataclass(frozen=True)
class CertificatePair:
    """A certificate and its private key.

    Attributes:
        certificate: PEM.
        key: PEM, without a password.
    """

    certificate: bytes
    key: bytes

    def write(self, certificate: Path, key: Path) -> None:
        """Write both files: the key first, readable by its owner only."""
        write_secret(key, self.key)
        write_whole(certificate, self.certificate)


def create_authority(name: str, *, days: int = AUTHORITY_DAYS) -> CertificatePair:
    """Create an authority: a self-signed P-256 certificate that may only sign servers' certificates.

    Args:
        name: Common name of the authority.
        days: Validity in days.
    """
    key, subject = ec.generate_private_key(ec.SECP256R1()), _common_name(name)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    critical = [x509.BasicConstraints(ca=True, path_length=0), usage]
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    end = datetime.now(UTC) + timedelta(days=days)
    return _sign(subject, subject, key, key, end, critical, [identifier])


def issue_certificate(
    authority: CertificatePair, names: Sequence[str], *, days: int = SERVER_DAYS
) -> CertificatePair:
    """Issue a server's certificate.

    Args:
        authority: The authority that signs it.
        names: Host names and IP addresses of the server; the first is the common name.
        days: Validity in days; it never outlives the authority.

    Raises:
        AuthorityError: The authority's key does not belong to its certificate, or the authority has expired.
    """
    signer, signer_key = _load(
        authority,
        "the authority's certificate",
        "restore both files",
        " with `fedsigma server rotate authority`",
    )
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    critical = [x509.BasicConstraints(ca=False, path_length=None), usage]
    other = [
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([_general_name(name) for name in names]),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
    ]
    end = min(datetime.now(UTC) + timedelta(days=days), signer.not_valid_after_utc)
    return _sign(_common_name(names[0][:64]), signer.subject, key, signer_key, end, critical, other)


def check_pair(pair: CertificatePair) -> None:
    """Check that a certificate and a key belong together, and that the certificate has not expired.

    Raises:
        AuthorityError: They are no pair, cannot be parsed, or the certificate has expired.
    """
    _load(pair, "the certificate", "pass the two files of one request")


def _load(pair: CertificatePair, name: str, remedy: str, command: str = "") -> tuple[x509.Certificate, Any]:
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = load_pem_private_key(pair.key, password=None)
    except (ValueError, TypeError) as error:
        raise AuthorityError(
            f"{name} or its key cannot be parsed as PEM without a password: {error}"
        ) from None
    if certificate.public_key() != key.public_key():
        raise AuthorityError(f"the key does not belong to {name}: {remedy}")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise AuthorityError(
            f"{name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: create a new one{command}"
        )
    return certificate, key


def _sign(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer_key: ec.EllipticCurvePrivateKey,
    end: datetime,
    critical: Sequence[x509.ExtensionType],
    other: Sequence[x509.ExtensionType],
) -> CertificatePair:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Valid from an hour ago, since a site's clock may be behind.
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(end)
    )
    for extension in (*critical, *other):
        builder = builder.add_extension(extension, critical=extension in critical)
    certificate = builder.sign(signer_key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return CertificatePair(certificate.public_bytes(Encoding.PEM), pem)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
