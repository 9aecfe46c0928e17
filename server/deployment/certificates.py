"""The server's certificate authority, and the certificates of its servers.

Sites are given the authority's certificate with their invitation and trust nothing else, so no public
authority is needed, and a server's certificate can be replaced without telling any site.
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
"""How long certificates are valid: what browsers accept of a server, and ten years of the authority."""


class AuthorityError(FedSigmaError, ValueError):
    """The authority's files cannot be used."""


@dataclass(frozen=True)
class CertificatePair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    def write(self, certificate: Path, key: Path) -> None:
        """Write both; the key first, readable by its owner alone, so that no reader finds half a pair."""
        write_secret(key, self.key)
        write_whole(certificate, self.certificate)


def create_authority(name: str, *, days: int = AUTHORITY_DAYS) -> CertificatePair:
    """Make an authority: a self-signed P-256 certificate that may sign servers' certificates and no more."""
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
    """Make a server's certificate.

    Args:
        authority: who signs it.
        names: host names and IP addresses by which the server is reached; the first is its common name.
        days: how long it is valid; never longer than the authority itself.

    Raises:
        AuthorityError: the authority's key does not belong to its certificate, or it has expired.
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


def check_pair(given: CertificatePair) -> None:
    """Refuse a certificate and key that do not belong together, or a certificate that has expired.

    Raises:
        AuthorityError: why.
    """
    try:
        certificate = x509.load_pem_x509_certificate(given.certificate)
        key = load_pem_private_key(given.key, password=None)
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"certificate or key do not read as PEM without a password: {error}") from None
    if certificate.public_key() != key.public_key():
        raise AuthorityError("the key does not belong to the certificate: give the pair of one request")
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
            " make a new one with `fedsigma server rotate authority`"
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
