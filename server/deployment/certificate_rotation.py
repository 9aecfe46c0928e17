"""Replace the server's certificates and its authority without an interruption.

The server's certificates are replaced at once, since sites trust the authority. The authority itself is
replaced in two steps: a new one is created and sites receive both; once all sites trust it, it signs.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsigma.common.utils.files import write_whole
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.certificates import CertificatePair, check_pair, create_authority
from fedsigma.server.deployment.database import utc_now
from fedsigma.server.deployment.home import ServerHome, ServerHomeError

__all__ = ["create_next_authority", "renew_certificates", "switch_authority"]


def renew_certificates(server: ServerHome, own: CertificatePair | None = None) -> None:
    """Issue new certificates of the same authority, or install a certificate of another authority.

    Args:
        server: The server.
        own: The new certificate, where sites trust an authority that is not the server's.

    Raises:
        ServerHomeError: Sites trust another authority, and `own` is None.
        AuthorityError: A key does not belong to its certificate, or the authority has expired.
    """
    if own is None and not _is_ours(server):
        raise ServerHomeError(
            "sites trust your own authority, for which FedSigma cannot sign: pass its new certificate with"
            " --certificate and --key"
        )
    if own is not None:
        check_pair(own)
    server.issue_inner()
    server.install_outer(own)
    _record(server, "certificate_renewed", own=own is not None)


def create_next_authority(server: ServerHome, out: Path) -> str:
    """Create the next authority, and write a file with both, for the sites to trust until the next one signs.

    Args:
        server: The server.
        out: A new file for the sites.

    Returns:
        The file's text, whose fingerprint both sides compare.

    Raises:
        ServerHomeError: Sites trust another authority than the server's.
        FileExistsError: `out` exists.
    """
    if not _is_ours(server):
        raise ServerHomeError(
            "sites trust your own authority: replace it there, and send its certificate to the sites"
        )
    if out.exists():
        raise FileExistsError(f"{out} exists: name another file")
    if not server.tls("next-ca.crt").exists():
        # The name has a date, so that people and logs can distinguish the two.
        authority = create_authority(f"{server.config.name} FedSigma authority {utc_now():%Y-%m-%d}")
        authority.write(server.tls("next-ca.crt"), server.tls("next-ca.key"))
    both = server.tls("ca.crt").read_bytes() + server.tls("next-ca.crt").read_bytes()
    write_whole(server.tls("sites.crt"), both)
    out.write_bytes(both)
    _record(server, "authority_begun")
    return both.decode("ascii")


def switch_authority(server: ServerHome) -> None:
    """Make the next authority sign; sites that do not trust it can no longer connect.

    Raises:
        ServerHomeError: There is no next authority.
    """
    if not server.tls("next-ca.crt").exists():
        raise ServerHomeError(
            "there is no next authority: create one with `fedsigma server rotate authority`"
        )
    for suffix in ("key", "crt"):
        server.tls(f"ca.{suffix}").replace(server.tls(f"old-ca.{suffix}"))
        server.tls(f"next-ca.{suffix}").replace(server.tls(f"ca.{suffix}"))
    server.issue_inner()
    server.install_outer()
    # Sites that join later need not trust the old one.
    write_whole(server.tls("sites.crt"), server.tls("ca.crt").read_bytes())
    _record(server, "authority_switched")


def _record(server: ServerHome, kind: str, **fields: object) -> None:
    """Write to the audit log, with the SHA-256 of the certificate that sites see."""
    certificate = x509.load_pem_x509_certificate(server.tls("outer.crt").read_bytes())
    fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
    ServerAuditLog(server.path).record(kind, sha256=fingerprint, **fields)


def _is_ours(server: ServerHome) -> bool:
    trusted = x509.load_pem_x509_certificates(server.tls("sites.crt").read_bytes())
    return x509.load_pem_x509_certificate(server.tls("ca.crt").read_bytes()) in trusted
