"""The key by which other sites know a site: made once, and kept in a file that its owner alone can read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedsigma.common.utils.errors import FedSigmaError

__all__ = ["NoIdentity", "new_identity", "read_identity", "simulated_identity"]


class NoIdentity(FedSigmaError, ValueError):
    """The task is masked, and the site's policy names no identity or does not know the others."""


def read_identity(path: Path) -> Ed25519PrivateKey:
    """Read the key that `new_identity` made.

    Raises:
        NoIdentity: the file holds no Ed25519 key.
    """
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise NoIdentity(f"{path} holds no Ed25519 key")
    return key


def new_identity(path: Path) -> str:
    """Make an Ed25519 key, keep it as PEM in a new file that its owner alone can read, and return the public
    key.

    Returns:
        The public key as 64 hex digits.

    Raises:
        FileExistsError: there is a file already; an identity is never replaced by accident.
        FileNotFoundError: its folder does not exist.
    """
    if path.exists():
        raise FileExistsError(
            f"{path} exists: an identity is not replaced, name another file or move it away"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: make it first")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return key.public_key().public_bytes_raw().hex()


def simulated_identity(name: str) -> Ed25519PrivateKey:
    """The identity of a simulated site: made from its name, so no secret; a simulation has none to keep."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"simulated {name}".encode()).digest())
