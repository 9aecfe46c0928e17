"""The server's certificate authority, and the certificates that it issues.

Sites receive the authority's certificate with their invitation and trust no other, so no public authority is
needed, and a server's certificate can be replaced without any change at the sites.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(subject, subject, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _issued(certificate, key)


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
    signer, signer_key = _loaded(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    builder = _builder(subject, signer.subject, key, days, latest=signer.not_valid_after_utc)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False
        )
        .sign(signer_key, hashes.SHA256())
    )
    return _issued(certificate, key)


def check_pair(pair: CertificatePair) -> None:
    """Check that a certificate and a key belong together, and that the certificate has not expired.

    Raises:
        AuthorityError: They are no pair, cannot be parsed, or the certificate has expired.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = load_pem_private_key(pair.key, password=None)
    except (ValueError, TypeError) as error:
        raise AuthorityError(
            f"certificate or key cannot be parsed as PEM without a password: {error}"
        ) from None
    if certificate.public_key() != key.public_key():
        raise AuthorityError("the key does not belong to the certificate: name the two files of one request")
    if certificate.not_valid_after_utc <= _now():
        raise AuthorityError(f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}")


def _loaded(authority: CertificatePair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = x509.load_pem_x509_certificate(authority.certificate)
    key = load_pem_private_key(authority.key, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise AuthorityError("the authority's key does not belong to its certificate: restore both files")
    if certificate.not_valid_after_utc <= _now():
        raise AuthorityError(
            f"the authority's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}:"
            " create a new one with `fedsigma server rotate authority`"
        )
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    *,
    latest: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    end = _now() + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A site's clock may be behind ours.
        .not_valid_before(_now() - datetime.timedelta(hours=1))
        .not_valid_after(min(end, latest) if latest else end)
    )


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> CertificatePair:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return CertificatePair(certificate.public_bytes(Encoding.PEM), pem)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
