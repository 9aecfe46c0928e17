"""Invitations and files of keys."""

from __future__ import annotations

import datetime
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.ops.enrolment_files import (
    EnrolmentFileError,
    Invitation,
    SiteKeys,
    check_site_name,
    fingerprint,
)

NOW = datetime.datetime(2026, 5, 1, tzinfo=datetime.UTC)
WORD, OTHER_WORD = "ab" * 32, "cd" * 32


def invitation(**changes: str) -> Invitation:
    values = {
        "site": "north",
        "server_name": "Server",
        "address": "fl.example.org:443",
        "certificates": "PEM",
        "word": WORD,
        "expires": "2026-05-15T00:00:00+00:00",
    }
    return Invitation(**{**values, **changes})


def node_key(curve: ec.EllipticCurve | None = None) -> str:
    public = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def keys(word: str | None = WORD, identity: Ed25519PrivateKey | None = None, **changes: str) -> SiteKeys:
    identity = identity or Ed25519PrivateKey.generate()
    values = {"site": "north", "node_key": node_key(), "made": NOW.isoformat(), **changes}
    return SiteKeys.sign(identity=identity, word=word, **values)


def test_an_invitation_comes_back_and_is_secret(tmp_path: Path) -> None:
    path = tmp_path / "north.join.json"
    invitation().write(path)
    assert Invitation.read(path) == invitation()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    invitation().check(now=NOW)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"expires": "2026-04-30T00:00:00+00:00"}, "expired on 2026-04-30"),
        ({"expires": "2026-06-01T00:00:00"}, "expired"),
        ({"expires": "soon"}, "expected a date"),
        ({"word": "AB"}, "not 64 hex digits"),
        ({"site": "../north"}, "the site's name is"),
    ],
)
def test_invalid_invitation_is_refused(changes: dict[str, str], why: str) -> None:
    with pytest.raises(EnrolmentFileError, match=why):
        invitation(**changes).check(now=NOW)


def test_keys_of_the_invited_site_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "north.keys.json"
    made = keys()
    made.write(path)
    assert SiteKeys.read(path) == made
    made.check(word=WORD)
    with pytest.raises(EnrolmentFileError, match="do not belong to its last invitation"):
        made.check(word=OTHER_WORD)


@pytest.mark.parametrize("field", ["site", "node_key", "identity", "made", "proof"])
def test_a_changed_field_breaks_the_signature(field: str) -> None:
    new = {"node_key": node_key(), "identity": "00" * 32, "proof": "00" * 32}.get(field, "south")
    with pytest.raises(EnrolmentFileError, match=r"was changed|is damaged"):
        replace(keys(), **{field: new}).check(word=WORD)


def test_keys_cannot_be_replaced_without_the_invitation() -> None:
    """A man in the middle signs with an identity of his own, and cannot make the proof."""
    forged = keys(OTHER_WORD)
    with pytest.raises(EnrolmentFileError, match="do not belong to its last invitation"):
        forged.check(word=WORD)


def test_renewed_keys_are_signed_by_the_identity_known() -> None:
    identity = Ed25519PrivateKey.generate()
    public = identity.public_key().public_bytes_raw().hex()
    keys(None, identity).check(word=None, identity=public)
    with pytest.raises(EnrolmentFileError, match="another identity"):
        keys(None).check(word=None, identity=public)


def test_a_node_key_of_another_curve_is_refused() -> None:
    with pytest.raises(EnrolmentFileError, match="not ECDSA P-384"):
        keys(node_key=node_key(ec.SECP256R1())).check(word=WORD)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is not an invitation"),
        ("[1]", "is not an invitation"),
        ('{"fedsigma": "keys", "version": 1}', "a file of kind 'keys'"),
        ('{"fedsigma": "join", "version": 2}', "of version 2, this FedSigma reads 1"),
        ('{"fedsigma": "join", "version": 1, "site": "x"}', "has other fields"),
        (json.dumps({"fedsigma": "join", "version": 1, **invitation().__dict__, "site": 5}), "other fields"),
    ],
)
def test_files_of_another_kind_are_refused(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(EnrolmentFileError, match=why):
        Invitation.read(path)
    with pytest.raises(EnrolmentFileError, match="cannot be read"):
        Invitation.read(tmp_path / "none")


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b", ALL_SITES, "x" * 65, "a\n"])
def test_site_name_is_a_valid_file_name(name: str) -> None:
    with pytest.raises(EnrolmentFileError):
        check_site_name(name)


def test_a_fingerprint_depends_on_every_part() -> None:
    assert fingerprint("a", "b") == fingerprint("a", b"b") != fingerprint("ab", "")
    assert len(fingerprint("a").replace("-", "")) == 20
