"""What a version of a model says of itself, and the signature by which a change is found.

The manifest has the digest of every file of the version, and its own bytes are signed with Ed25519. So a file
that was changed, exchanged or added is found by whoever knows the signer's public key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_secret

__all__ = ["Manifest", "ModelError", "Signer", "SiteRow", "method_rows"]

FORMAT = "fedsigma-model-1"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
METHODS = ("zero_shot", "local_only", "pooled", "shared_only", "federated")


class ModelError(FedSigmaError, ValueError):
    """A version of a model is missing, was changed, or cannot be made."""


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site's part. name: empty where it does not want to be named; accuracy on its own test images."""

    name: str
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a version says of itself.

    Fields: name, of the study, or given to what was made from other versions; version, counted from 1;
    created, ISO, UTC; made, `trained`, or how it came of its parents; parents, as NAME@N; backbone, the
    study's name for it; weights and layout, SHA-256 of the backbone's weights and of the layout; study, the
    SHA-256 of the study as resolved; classes; rounds; results, by method the accuracy and metrics over all
    sites' test images, shares between 0 and 1; sites; files, the SHA-256 of each file beside the manifest;
    signer, the public key, 64 hex digits.
    """

    name: str
    version: int
    created: str
    made: str
    backbone: str
    weights: str
    layout: str
    study: str
    classes: tuple[str, ...]
    rounds: int
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sites: tuple[SiteRow, ...] = ()
    parents: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    signer: str = ""

    @property
    def reference(self) -> str:
        """NAME@N."""
        return f"{self.name}@{self.version}"

    def to_bytes(self) -> bytes:
        """The bytes that are signed."""
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path, *, signer: str = "") -> Manifest:
        """Read the manifest of a version and verify it with all files of its folder.

        Args:
            folder: of the version.
            signer: the public key that must have signed it (64 hex digits); empty for whichever it names,
                which finds damage, and no one who signs anew.

        Raises:
            ModelError: it is missing, was changed, or is signed by another.
        """
        try:
            content = (folder / MANIFEST).read_bytes()
            signature = bytes.fromhex((folder / SIGNATURE).read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} is no version of a model: {error}") from None
        found = _parse(content, folder)
        if signer and found.signer != signer:
            raise ModelError(f"{folder} is signed by {found.signer[:16]}…, expected {signer[:16]}…")
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(found.signer)).verify(signature, content)
        except (InvalidSignature, ValueError):
            raise ModelError(
                f"{folder}: the signature does not fit the manifest, so one was changed:"
                " take the version from a backup"
            ) from None
        _check_files(found, folder)
        return found


def _parse(content: bytes, folder: Path) -> Manifest:
    try:
        values = json.loads(content)
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        values["sites"] = tuple(SiteRow(**row) for row in values["sites"])
        values |= {key: tuple(values[key]) for key in ("classes", "parents")}
        return Manifest(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST} does not read: {error}") from None


def _check_files(manifest: Manifest, folder: Path) -> None:
    there = {path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE}
    if more := sorted(there - set(manifest.files)):
        raise ModelError(f"{folder} holds {more[0]}, which the manifest does not name: remove it")
    for name, digest in manifest.files.items():
        path = folder / name
        if name not in there or not path.is_file() or digest_of(path.read_bytes()) != digest:
            raise ModelError(f"{path} was changed or is missing: take the version from a backup")


def digest_of(content: bytes) -> str:
    """SHA-256, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


class Signer:
    """Signs manifests with an Ed25519 key that its owner alone can read.

    Args:
        path: of the private key, PEM; made at first use.

    Raises:
        ModelError: the file holds no Ed25519 key.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = Ed25519PrivateKey.generate()
            write_secret(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} holds no key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ModelError(f"{path} holds no Ed25519 key")
        self._key = key

    @property
    def public(self) -> str:
        """The public key, 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> str:
        """The signature, 128 hex digits."""
        return self._key.sign(content).hex()


def method_rows(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a run's summary belongs into a manifest: by method the accuracy and metrics over all sites."""
    return {
        method: {"accuracy": summary[method].get("accuracy"), "metrics": summary[method].get("metrics", {})}
        for method in METHODS
        if isinstance(summary.get(method), Mapping)
    }


def check_name(name: str) -> None:
    """Refuse a model's name that would not do as a folder's.

    Raises:
        ModelError: it is not letters, digits, `.`, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ModelError(f"a model's name is {name!r}, expected letters, digits, '.', '_' or '-'")
