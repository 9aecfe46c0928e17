"""The signed manifest of a model version.

The manifest lists the SHA-256 of every file of the version, and its own bytes are signed with Ed25519. The
signer's public key is enough to detect a changed, replaced or added file.
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
    """A model version is missing, was changed, or cannot be created."""


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site that took part in training.

    Attributes:
        name: Name of the site; empty if its policy does not allow attribution.
        accuracy: Accuracy on the site's own test images, between 0 and 1.
    """

    name: str
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The signed description of a model version.

    Attributes:
        name: Name of the model: the study's name, or the name given to a combination.
        version: Number of the version, counted from 1.
        created: Time of creation, ISO 8601, UTC.
        origin: `trained`, or how the version was computed from its parents.
        backbone: Backbone as the study names it.
        weights: SHA-256 of the backbone's weights.
        layout: SHA-256 of the layout.
        study: SHA-256 of the resolved study.
        classes: Class names.
        rounds: Number of rounds.
        results: For each method, the accuracy and metrics over all sites' test images, between 0 and 1.
        sites: The participating sites.
        parents: Parent versions as NAME@N.
        files: SHA-256 of each file beside the manifest.
        signer: Public key, 64 hex digits.
    """

    name: str
    version: int
    created: str
    origin: str
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
        """The reference of the version, NAME@N."""
        return f"{self.name}@{self.version}"

    def to_bytes(self) -> bytes:
        """Return the JSON text that is signed."""
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path, *, signer: str = "") -> Manifest:
        """Read the manifest of a version and verify its signature and all files of its folder.

        With an empty `signer`, a public key, the signature is verified with the key in the manifest. This
        detects damage, but not a manifest signed again with another key.

        Raises:
            ModelError: The manifest is missing, a file was changed, or the signer is another.
        """
        try:
            content = (folder / MANIFEST).read_bytes()
            signature = bytes.fromhex((folder / SIGNATURE).read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} is not a model version: {error}") from None
        manifest = _parse(content, folder)
        if signer and manifest.signer != signer:
            raise ModelError(f"{folder} is signed by {manifest.signer[:16]}…, expected {signer[:16]}…")
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(manifest.signer)).verify(signature, content)
        except (InvalidSignature, ValueError):
            raise ModelError(
                f"{folder}: the signature does not match the manifest, so one of them was changed:"
                " restore the version from a backup"
            ) from None
        _check_files(manifest, folder)
        return manifest


def _parse(content: bytes, folder: Path) -> Manifest:
    try:
        values = json.loads(content)
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        values["sites"] = tuple(SiteRow(**row) for row in values["sites"])
        values |= {key: tuple(values[key]) for key in ("classes", "parents")}
        return Manifest(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST} cannot be parsed: {error}") from None


def _check_files(manifest: Manifest, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE}
    if more := sorted(names - set(manifest.files)):
        raise ModelError(f"{folder} contains {more[0]}, which the manifest does not list: remove it")
    for name, digest in manifest.files.items():
        path = folder / name
        if name not in names or not path.is_file() or digest_of(path.read_bytes()) != digest:
            raise ModelError(f"{path} was changed or is missing: restore the version from a backup")


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes, 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


class Signer:
    """Signs manifests with an Ed25519 key.

    Args:
        path: Private key, PEM, readable by its owner only; created at first use.

    Raises:
        ModelError: The file does not contain an Ed25519 key.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            generated = Ed25519PrivateKey.generate()
            write_secret(path, generated.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} does not contain a private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ModelError(f"{path} does not contain an Ed25519 key")
        self._key = key

    @property
    def public(self) -> str:
        """The public key, 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> str:
        """Return the signature of bytes, 128 hex digits."""
        return self._key.sign(content).hex()


def method_rows(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Select the accuracy and metrics over all sites of each method in a run's summary."""
    return {
        method: {"accuracy": summary[method].get("accuracy"), "metrics": summary[method].get("metrics", {})}
        for method in METHODS
        if isinstance(summary.get(method), Mapping)
    }


def check_name(name: str) -> None:
    """Raise ModelError if a model's name cannot be used as a folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ModelError(f"the model name is {name!r}, expected letters, digits, '.', '_' or '-'")
