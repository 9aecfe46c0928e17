"""A site's Ed25519 identity key, by which other sites recognise it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["NoIdentity", "new_identity", "read_identity", "simulated_identity"]


class NoIdentity(FedSigmaError, ValueError):
    """The task uses secure aggregation, and the site's policy lacks an identity or the peers' keys."""


def read_identity(path: Path) -> Ed25519PrivateKey:
    """Read the private key of a PEM file.

    Raises:
        NoIdentity: The file holds no Ed25519 key.
    """
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise NoIdentity(f"{path} holds no Ed25519 key: create one with `fedsigma identity`")
    return key


def new_identity(path: Path) -> str:
    """Create an Ed25519 key in a new PEM file, readable by its owner only.

    Returns:
        The public key, 64 hex digits.

    Raises:
        FileExistsError: The file exists.
        FileNotFoundError: The file's folder does not exist.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: name another file, or move it away")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it first")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return key.public_key().public_bytes_raw().hex()


def simulated_identity(name: str) -> Ed25519PrivateKey:
    """Return the key of a simulated site, derived from its name and so not secret."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"simulated {name}".encode()).digest())
