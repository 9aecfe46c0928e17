"""Replacing what sites trust and what the server shows them, without a gap.

The server's certificates are replaced at once: sites trust the authority. The authority itself is replaced in
two steps, with an overlap: a new one is made and sites are given both; once all have it, it signs.
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
    """Make new certificates of the same authority, or take a new one of the group's own into use.

    Raises:
        ServerError: sites trust another authority than the server's, and no certificate of that is given.
        AuthorityError: a key does not belong to its certificate, or the authority has expired.
    """
    if own is None and not _is_ours(server):
        raise ServerHomeError(
            "sites trust your own authority, which FedSigma cannot sign for: give its new certificate by"
            " --certificate and --key"
        )
    if own is not None:
        check_pair(own)
    server.issue_inner()
    if own is not None:
        own.write(server.tls("outer.crt"), server.tls("outer.key"))
    else:
        server.issue_outer()
    _note(server, "certificate_renewed", own=own is not None)


def create_next_authority(server: ServerHome, out: Path) -> str:
    """Make the next authority, and write what sites are to trust until it signs: both.

    Args:
        server: the server.
        out: of a new file for the sites.

    Returns:
        The file's text, of which both sides compare the fingerprint.

    Raises:
        ServerError: a next one was made already, or sites trust another authority than the server's.
        FileExistsError: there is such a file.
    """
    if not _is_ours(server):
        raise ServerHomeError(
            "sites trust your own authority: replace it there, and send sites its certificate"
        )
    if out.exists():
        raise FileExistsError(f"{out} exists: name another file")
    if not server.tls("next-ca.crt").exists():
        # A name of its own, so that people and logs can tell the two apart.
        made = create_authority(f"{server.config.name} FedSigma authority {utc_now():%Y-%m-%d}")
        made.write(server.tls("next-ca.crt"), server.tls("next-ca.key"))
    both = server.tls("ca.crt").read_bytes() + server.tls("next-ca.crt").read_bytes()
    write_whole(server.tls("sites.crt"), both)
    out.write_bytes(both)
    _note(server, "authority_begun")
    return both.decode("ascii")


def switch_authority(server: ServerHome) -> None:
    """Have the next authority sign from now on; sites that were not given it are shut out.

    Raises:
        ServerError: there is no next one.
    """
    if not server.tls("next-ca.crt").exists():
        raise ServerHomeError("there is no next authority: make one with `fedsigma server rotate authority`")
    for suffix in ("key", "crt"):
        server.tls(f"ca.{suffix}").replace(server.tls(f"old-ca.{suffix}"))
        server.tls(f"next-ca.{suffix}").replace(server.tls(f"ca.{suffix}"))
    server.issue_inner()
    server.issue_outer()
    # Those that join from now on need not trust the old one.
    write_whole(server.tls("sites.crt"), server.tls("ca.crt").read_bytes())
    _note(server, "authority_switched")


def _note(server: ServerHome, kind: str, **fields: object) -> None:
    ServerAuditLog(server.path).record(kind, sha256=_fingerprint(server), **fields)


def _fingerprint(server: ServerHome) -> str:
    """Of the certificate that sites are shown."""
    shown = x509.load_pem_x509_certificate(server.tls("outer.crt").read_bytes())
    return shown.fingerprint(hashes.SHA256()).hex()


def _is_ours(server: ServerHome) -> bool:
    trusted = x509.load_pem_x509_certificates(server.tls("sites.crt").read_bytes())
    return x509.load_pem_x509_certificate(server.tls("ca.crt").read_bytes()) in trusted
