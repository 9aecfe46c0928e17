"""Replacing what sites trust and what the centre shows them, without a gap.

The server's certificates are replaced at once: sites trust the authority. The authority itself is replaced in
two steps, with an overlap: a new one is made and sites are given both; once all have it, it signs.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fedsigma.common.utils.files import write_whole
from fedsigma.server.deployment.audit_log import CentreLog
from fedsigma.server.deployment.certificates import Issued, check_pair, new_authority
from fedsigma.server.deployment.home import CentreError, CentreFolder
from fedsigma.server.deployment.registry import now

__all__ = ["begin_authority", "renew_certificates", "switch_authority"]


def renew_certificates(centre: CentreFolder, own: Issued | None = None) -> None:
    """Make new certificates of the same authority, or take a new one of the group's own into use.

    Raises:
        CentreError: sites trust another authority than the centre's, and no certificate of that is given.
        AuthorityError: a key does not belong to its certificate, or the authority has expired.
    """
    if own is None and not _is_ours(centre):
        raise CentreError(
            "sites trust your own authority, which FedSigma cannot sign for: give its new certificate by"
            " --certificate and --key"
        )
    if own is not None:
        check_pair(own)
    centre.issue_inner()
    if own is not None:
        own.write(centre.tls("outer.crt"), centre.tls("outer.key"))
    else:
        centre.issue_outer()
    _note(centre, "certificate_renewed", own=own is not None)


def begin_authority(centre: CentreFolder, out: Path) -> str:
    """Make the next authority, and write what sites are to trust until it signs: both.

    Args:
        centre: the centre.
        out: of a new file for the sites.

    Returns:
        The file's text, of which both sides compare the fingerprint.

    Raises:
        CentreError: a next one was made already, or sites trust another authority than the centre's.
        FileExistsError: there is such a file.
    """
    if not _is_ours(centre):
        raise CentreError("sites trust your own authority: replace it there, and send sites its certificate")
    if out.exists():
        raise FileExistsError(f"{out} exists: name another file")
    if not centre.tls("next-ca.crt").exists():
        # A name of its own, so that people and logs can tell the two apart.
        made = new_authority(f"{centre.config.name} FedSigma authority {now():%Y-%m-%d}")
        made.write(centre.tls("next-ca.crt"), centre.tls("next-ca.key"))
    both = centre.tls("ca.crt").read_bytes() + centre.tls("next-ca.crt").read_bytes()
    write_whole(centre.tls("sites.crt"), both)
    out.write_bytes(both)
    _note(centre, "authority_begun")
    return both.decode("ascii")


def switch_authority(centre: CentreFolder) -> None:
    """Have the next authority sign from now on; sites that were not given it are shut out.

    Raises:
        CentreError: there is no next one.
    """
    if not centre.tls("next-ca.crt").exists():
        raise CentreError("there is no next authority: make one with `fedsigma server rotate authority`")
    for suffix in ("key", "crt"):
        centre.tls(f"ca.{suffix}").replace(centre.tls(f"old-ca.{suffix}"))
        centre.tls(f"next-ca.{suffix}").replace(centre.tls(f"ca.{suffix}"))
    centre.issue_inner()
    centre.issue_outer()
    # Those that join from now on need not trust the old one.
    write_whole(centre.tls("sites.crt"), centre.tls("ca.crt").read_bytes())
    _note(centre, "authority_switched")


def _note(centre: CentreFolder, kind: str, **fields: object) -> None:
    CentreLog(centre.path).note(kind, sha256=_fingerprint(centre), **fields)


def _fingerprint(centre: CentreFolder) -> str:
    """Of the certificate that sites are shown."""
    shown = x509.load_pem_x509_certificate(centre.tls("outer.crt").read_bytes())
    return shown.fingerprint(hashes.SHA256()).hex()


def _is_ours(centre: CentreFolder) -> bool:
    trusted = x509.load_pem_x509_certificates(centre.tls("sites.crt").read_bytes())
    return x509.load_pem_x509_certificate(centre.tls("ca.crt").read_bytes()) in trusted
