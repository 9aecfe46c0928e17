"""The two files by which a site joins a server: the invitation, and the site's public keys in return.

    server: invite  ->  hospital-1.join.json   server, its certificates, a secret word, an end date
    site:   enrol   ->  hospital-1.keys.json   two public keys, bound to that word and signed
    server: admit

Private keys are made at the site and never leave it. The invitation's word shows that the keys come from
whoever was given the invitation; what it cannot show is that nobody exchanged both files on their way, so
both sides read each other the few words of `fingerprint` over the telephone.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["EnrolmentFileError", "Invitation", "SiteKeys", "check_site_name", "fingerprint", "write_json"]

_VERSION = 1
_LARGEST = 1 << 20
T = TypeVar("T", "Invitation", "SiteKeys")


class EnrolmentFileError(FedSigmaError, ValueError):
    """An invitation or a file of keys is damaged, too old, forged or of another kind."""


def check_site_name(name: str) -> None:
    """Refuse a site's name that would not do as a file's name and in reports.

    Raises:
        JoinError: it is not letters, digits, `.`, `_` and `-`, or longer than 64, or a reserved word.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == "pooled":
        raise EnrolmentFileError(
            f"the site's name is {name[:80]!r}, expected 1 to 64 letters, digits, '.', '_' or '-',"
            " beginning with a letter or digit, and not 'pooled'"
        )


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What the server gives a site.

    Fields: site, its name; server_name, that of the server; address, HOST:PORT that the site's node calls;
    certificates, PEM of the authorities that it trusts; word, 64 hex digits that only the two know; expires,
    an ISO date and time in UTC.
    """

    site: str
    server_name: str
    address: str
    certificates: str
    word: str
    expires: str

    def check(self, *, now: datetime.datetime) -> None:
        """Refuse an invitation that is no longer valid.

        Raises:
            JoinError: it has expired, or a field is not in order.
        """
        check_site_name(self.site)
        if not re.fullmatch("[0-9a-f]{64}", self.word):
            raise EnrolmentFileError(
                "the invitation's word is no 64 hex digits: ask the server for a new one"
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

    def write(self, path: Path) -> None:
        """Write the invitation."""
        write_json(path, "join", asdict(self), secret=True)

    @classmethod
    def read(cls, path: Path) -> Invitation:
        """Read what `write` wrote.

        Raises:
            JoinError: it is not an invitation.
        """
        return _read(cls, path, "join")


@dataclass(frozen=True, kw_only=True)
class SiteKeys:
    """What a site gives the server: public keys only.

    Fields: site; node_key, by which its Flower node is known (OpenSSH, ECDSA P-384); identity, its Ed25519
    public key (64 hex digits), which other sites pin; made, when; proof, HMAC-SHA256 of the rest under the
    invitation's word (empty when keys are renewed); signature, by the identity, of all the rest.
    """

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
        """Make the file of keys, bound to an invitation's word or (None) to the identity known already."""
        public = identity.public_key().public_bytes_raw().hex()
        keys = cls(site=site, node_key=node_key, identity=public, made=made)
        proof = _proof(keys, word) if word else ""
        keys = cls(site=site, node_key=node_key, identity=public, made=made, proof=proof)
        signature = base64.b64encode(identity.sign(keys._signed())).decode()
        return cls(site=site, node_key=node_key, identity=public, made=made, proof=proof, signature=signature)

    def check(self, *, word: str | None, identity: str | None = None) -> None:
        """Refuse keys that do not come from whom they should.

        Args:
            word: of the invitation; None where keys are renewed.
            identity: the site's known public key, where keys are renewed.

        Raises:
            JoinError: a key is of the wrong kind, or proof or signature is wrong.
        """
        check_site_name(self.site)
        try:
            node = load_ssh_public_key(self.node_key.encode())
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.identity))
        except (ValueError, UnsupportedAlgorithm):
            raise EnrolmentFileError(
                "a key in the file is damaged: have the site make the file again"
            ) from None
        if not isinstance(node, EllipticCurvePublicKey) or not isinstance(node.curve, SECP384R1):
            raise EnrolmentFileError(
                "the node's key is not ECDSA P-384: have the site make it with `fedsigma site enrol`"
            )
        try:
            public.verify(base64.b64decode(self.signature), self._signed())
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

    def write(self, path: Path) -> None:
        """Write the file of keys."""
        write_json(path, "keys", asdict(self), secret=False)

    @classmethod
    def read(cls, path: Path) -> SiteKeys:
        """Read what `write` wrote.

        Raises:
            JoinError: it is not a file of keys.
        """
        return _read(cls, path, "keys")

    def _signed(self) -> bytes:
        return _canonical(self, without=("signature",))


def fingerprint(*parts: str | bytes) -> str:
    """Twenty letters and digits that stand for some public text, to be read aloud: 100 bits of SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big") + raw)
    text = base64.b32encode(digest.digest())[:20].decode()
    return "-".join(text[i : i + 5] for i in range(0, 20, 5))


def write_json(path: Path, kind: str, values: dict[str, Any], *, secret: bool) -> None:
    """Write one of these files; `secret` ones are readable by their owner alone."""
    path.touch(mode=0o600 if secret else 0o644)
    path.write_text(json.dumps({"fedsigma": kind, "version": _VERSION, **values}, indent=2) + "\n", "utf-8")


def _read(cls: type[T], path: Path, kind: str) -> T:
    what = {"join": "an invitation", "keys": "a file of keys"}[kind]
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_LARGEST))
        found, version = values.pop("fedsigma"), values.pop("version")
    except OSError as error:
        raise EnrolmentFileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EnrolmentFileError(f"{path} is not {what}: ask for it again") from None
    if found != kind:
        raise EnrolmentFileError(f"{path} is a file of kind {found!r}, expected {what}")
    if version != _VERSION:
        raise EnrolmentFileError(
            f"{path} is of version {version!r}, this FedSigma reads {_VERSION}: update the older side"
        )
    if set(values) != set(cls.__dataclass_fields__) or not all(isinstance(v, str) for v in values.values()):
        raise EnrolmentFileError(f"{path} has other fields than {what}: ask for it again")
    return cls(**values)


def _canonical(keys: SiteKeys, *, without: tuple[str, ...]) -> bytes:
    values = {name: value for name, value in asdict(keys).items() if name not in without}
    return b"fedsigma site keys\0" + json.dumps(values, sort_keys=True).encode()


def _proof(keys: SiteKeys, word: str) -> str:
    text = _canonical(keys, without=("signature", "proof"))
    return hmac.new(bytes.fromhex(word), text, hashlib.sha256).hexdigest()
