"""The two files by which a site joins a server: the invitation, and the site's public keys in return.

    server: invite  ->  hospital-1.join.json   server, its certificates, a secret word, an end date
    site:   enrol   ->  hospital-1.keys.json   two public keys, bound to that word and signed
    server: admit

Private keys are created at the site and never leave it. The secret word proves that the keys come from the
receiver of the invitation. It cannot prove that nobody replaced both files in transit, so both sides compare
their `fingerprint` on the phone.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["EnrolmentFileError", "Invitation", "SiteKeys", "check_site_name", "fingerprint"]

_VERSION = 1
_MAX_BYTES = 1 << 20


class EnrolmentFileError(FedSigmaError, ValueError):
    """An invitation or a file of keys is damaged, expired, forged or of another kind."""


def check_site_name(name: str) -> None:
    """Check that a site's name can be used in file names and reports.

    Raises:
        EnrolmentFileError: It has other characters than letters, digits, `.`, `_` and `-`, or is longer
            than 64.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise EnrolmentFileError(
            f"the site's name is {name[:80]!r}, expected 1 to 64 letters, digits, '.', '_' or '-',"
            " beginning with a letter or digit"
        )


class _EnrolmentFile:
    """A dataclass of texts that is stored as one JSON object, with its kind and a version."""

    kind: ClassVar[str]
    title: ClassVar[str]
    mode: ClassVar[int]

    def write(self, path: Path) -> None:
        """Write the file; an invitation is readable by its owner only."""
        content = {"fedsigma": self.kind, "version": _VERSION, **vars(self)}
        path.touch(mode=self.mode)
        path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `write` wrote.

        Raises:
            EnrolmentFileError: The file cannot be read, or is of another kind or version.
        """
        try:
            with path.open("rb") as file:
                values = json.loads(file.read(_MAX_BYTES))
            kind, version = values.pop("fedsigma"), values.pop("version")
        except OSError as error:
            raise EnrolmentFileError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EnrolmentFileError(f"{path} is not {cls.title}: ask for a new one") from None
        if kind != cls.kind:
            raise EnrolmentFileError(f"{path} is a file of kind {kind!r}, expected {cls.title}")
        if version != _VERSION:
            raise EnrolmentFileError(
                f"{path} is of version {version!r}, this FedSigma reads {_VERSION}: update the older side"
            )
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(values) != names or not all(isinstance(value, str) for value in values.values()):
            raise EnrolmentFileError(f"{path} has other fields than {cls.title}: ask for a new one")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Invitation(_EnrolmentFile):
    """An invitation, which the server sends to a site.

    Attributes:
        site: Name of the site.
        server_name: Name of the server.
        address: HOST:PORT that the site's node connects to.
        certificates: PEM certificates of the authorities that the site trusts.
        word: Secret that only the two sides have, 64 hex digits.
        expires: End of validity, ISO date and time with a time zone.
    """

    kind, title, mode = "join", "an invitation", 0o600

    site: str
    server_name: str
    address: str
    certificates: str
    word: str
    expires: str

    def check(self, *, now: datetime.datetime) -> None:
        """Check that the invitation is valid at this time.

        Raises:
            EnrolmentFileError: It has expired, or a field is invalid.
        """
        check_site_name(self.site)
        if not re.fullmatch("[0-9a-f]{64}", self.word):
            raise EnrolmentFileError(
                "the invitation's secret word is not 64 hex digits: ask the server for a new invitation"
            )
        try:
            end = datetime.datetime.fromisoformat(self.expires)
        except ValueError:
            raise EnrolmentFileError(
                f"the invitation's end is {self.expires[:40]!r}, expected a date"
            ) from None
        if end.tzinfo is None or now >= end:
            raise EnrolmentFileError(
                f"the invitation expired on {self.expires}: ask the server for a new one"
            )


@dataclass(frozen=True, kw_only=True)
class SiteKeys(_EnrolmentFile):
    """The public keys that a site sends to the server.

    Attributes:
        site: Name of the site.
        node_key: Key of its Flower node, ECDSA P-384 in OpenSSH's format.
        identity: Ed25519 key of the site, which other sites pin, 64 hex digits.
        made: Time of creation.
        proof: HMAC-SHA256 of the fields above with the invitation's word; empty for renewed keys.
        signature: Signature of all other fields by the identity, Base64.
    """

    kind, title, mode = "keys", "a file of keys", 0o644

    site: str
    node_key: str
    identity: str
    made: str
    proof: str = ""
    signature: str = ""

    @classmethod
    def sign(
        cls, *, site: str, node_key: str, identity: Ed25519PrivateKey, made: str, word: str | None
    ) -> SiteKeys:
        """Create the file of keys; `word` is the invitation's, None for renewed keys."""
        public = identity.public_key().public_bytes_raw().hex()
        keys = cls(site=site, node_key=node_key, identity=public, made=made)
        keys = replace(keys, proof=_proof(keys, word) if word else "")
        signature = identity.sign(_canonical(keys, "signature"))
        return replace(keys, signature=base64.b64encode(signature).decode())

    def check(self, *, word: str | None, identity: str | None = None) -> None:
        """Check that the keys come from the invited site, or from the site with this identity.

        Args:
            word: Secret word of the invitation; None for renewed keys.
            identity: Known identity of the site, for renewed keys.

        Raises:
            EnrolmentFileError: A key is of another type, or the proof or signature is wrong.
        """
        check_site_name(self.site)
        try:
            node = load_ssh_public_key(self.node_key.encode())
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.identity))
        except (ValueError, UnsupportedAlgorithm):
            raise EnrolmentFileError(
                "a key in the file is damaged: ask the site to create the file again"
            ) from None
        if not isinstance(node, EllipticCurvePublicKey) or not isinstance(node.curve, SECP384R1):
            raise EnrolmentFileError(
                "the node's key is not ECDSA P-384: create it at the site with `fedsigma site enrol`"
            )
        try:
            public.verify(base64.b64decode(self.signature), _canonical(self, "signature"))
        except (InvalidSignature, ValueError):
            raise EnrolmentFileError(
                "the file of keys is not signed by its own identity: it was changed"
            ) from None
        if word is not None and not hmac.compare_digest(self.proof, _proof(self, word)):
            raise EnrolmentFileError(
                f"the keys of '{self.site}' do not belong to its last invitation: send a new one with"
                " `fedsigma server invite`"
            )
        if identity is not None and self.identity != identity:
            raise EnrolmentFileError(
                f"the keys of '{self.site}' are signed by another identity than the one known"
            )


def fingerprint(*parts: str | bytes) -> str:
    """Return 20 letters and digits to compare on the phone: 100 bits of SHA-256 of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    text = base64.b32encode(digest.digest())[:20].decode()
    return "-".join(text[i : i + 5] for i in range(0, 20, 5))


def _canonical(keys: SiteKeys, *without: str) -> bytes:
    values = {name: value for name, value in asdict(keys).items() if name not in without}
    return b"fedsigma site keys\0" + json.dumps(values, sort_keys=True).encode()


def _proof(keys: SiteKeys, word: str) -> str:
    text = _canonical(keys, "signature", "proof")
    return hmac.new(bytes.fromhex(word), text, hashlib.sha256).hexdigest()
