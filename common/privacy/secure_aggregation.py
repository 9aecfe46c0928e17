"""Pairwise masks over integers, so that a server learns the sum of the sites' changes and nothing else of
them.

Each pair of sites shares a stream of integers that one adds and the other subtracts, modulo 2^32; in the sum
of all they cancel (Bonawitz et al. 2017, doi:10.1145/3133956.3133982, without its secret sharing: when a site
drops out, the round is repeated without it). The stream comes from an X25519 exchange of keys that live for
one run, by HKDF bound to run, round, attempt, task and cohort, and ChaCha20. Each key is signed by its site's
Ed25519 identity, which the other sites know beforehand: a server that passes on keys cannot put its own in
their place.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsigma.common.utils.errors import FedSigmaError

__all__ = [
    "MaskContext",
    "MaskingError",
    "Member",
    "check_members",
    "mask",
    "scale_for",
    "sign",
    "to_integers",
    "unmask_sum",
]

_SIGN, _MASK = b"fedsigma mask key v1\0", b"fedsigma mask v2\0"
Integers = NDArray[np.uint32]


class MaskingError(FedSigmaError, ValueError):
    """A key that cannot be trusted, or values that do not fit; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One site of a cohort: its X25519 public key for this run, and its identity's signature of it."""

    name: str
    key: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class MaskContext:
    """What one mask is for. Two masks of the same pair are equal only if all of this is.

    Under one mask two different vectors would give their difference away. So all that shapes what a site adds
    belongs here: bound and most_examples, which set the scale, and task, the SHA-256 of the whole task, with
    its recipe, its shift and its privacy.
    """

    run: int
    round: int
    attempt: int
    members: tuple[Member, ...]
    bound: float
    most_examples: int
    task: bytes = bytes(32)

    @property
    def scale(self) -> float:
        """What weighted values are multiplied with: see `scale_for`."""
        return scale_for(bound=self.bound, weights=len(self.members) * self.most_examples)

    @property
    def cohort(self) -> bytes:
        """SHA-256 of the members' names and keys, in order (32 bytes)."""
        digest = hashlib.sha256()
        for one in self.members:
            name = one.name.encode()
            digest.update(struct.pack("<I", len(name)) + name + one.key)
        return digest.digest()

    @property
    def info(self) -> bytes:
        """What HKDF binds a key to."""
        numbers = struct.pack("<QQQdQ", self.run, self.round, self.attempt, self.bound, self.most_examples)
        return _MASK + numbers + self.task + self.cohort


def _signed(run: int, name: str, key: bytes) -> bytes:
    return _SIGN + struct.pack("<Q", run) + key + name.encode()


def sign(identity: Ed25519PrivateKey, *, run: int, name: str, key: bytes) -> Member:
    """A site's own entry in a cohort: its key of this run, signed."""
    return Member(name=name, key=key, signature=identity.sign(_signed(run, name, key)))


def check_members(place: MaskContext, identities: Mapping[str, bytes], *, me: str, key: bytes) -> None:
    """Check that the keys of a cohort are those of known sites.

    Args:
        place: The context, with the members as the server named them.
        identities: The Ed25519 public key (32 bytes) of each site that this one knows.
        me: This site's name.
        key: This site's X25519 public key of this run, 32 bytes.

    Raises:
        MaskingError: A site is unknown, named twice or out of order, a signature is invalid, or this site is
            not among the members with its own key.
    """
    names = [one.name for one in place.members]
    if names != sorted(set(names)):
        raise MaskingError("the cohort names a site twice or out of order")
    if (me, key) not in [(one.name, one.key) for one in place.members]:
        raise MaskingError("this site is not in the cohort with the key that it sent")
    for one in place.members:
        if one.name not in identities:
            raise MaskingError(f"site '{one.name}' is not among the sites that this one knows")
        try:
            public = Ed25519PublicKey.from_public_bytes(identities[one.name])
            public.verify(one.signature, _signed(place.run, one.name, one.key))
        except (InvalidSignature, ValueError) as error:
            raise MaskingError(f"the key of site '{one.name}' is not signed by that site") from error


def scale_for(*, bound: float, weights: float) -> float:
    """The largest power of two by which weighted values can be multiplied without overflow of their sum.

    Args:
        bound: the largest magnitude of a value.
        weights: the sum of the weights of all sites, at most.

    The sum over the sites of round(weight * value * scale) is at most bound * weights * scale plus a half for
    each site, and has to stay below 2^31; 2^30 leaves room for the halves of up to 2^31 sites.

    Raises:
        MaskingError: not even the values themselves would fit.
    """
    scale = 2.0 ** math.floor(math.log2(2**30 / (bound * weights)))
    if scale < 1:
        raise MaskingError(f"values up to {bound:g} with weights of {weights:g} do not fit 32 bits")
    return scale


def to_integers(values: NDArray[np.floating], *, weight: float, scale: float, bound: float) -> Integers:
    """round(weight * value * scale) modulo 2^32.

    Raises:
        MaskingError: a value is not finite or above the bound: it would overflow the sum without a trace.
    """
    x = np.asarray(values, dtype=np.float64)
    if not bool((np.abs(x) <= bound).all()):
        raise MaskingError(f"a value is above {bound:g}, for which the masked sum has no room")
    return np.rint(x * weight * scale).astype(np.int64).astype(np.uint32)


def mask(integers: Integers, place: MaskContext, *, me: str, private: X25519PrivateKey) -> Integers:
    """Add the stream shared with each site after this one in the cohort, and take off that of each before."""
    masked = integers.copy()
    for one in place.members:
        if one.name != me:
            stream = _stream(private, one.key, place.info, integers.size)
            masked = masked + stream if me < one.name else masked - stream
    return masked


def _stream(private: X25519PrivateKey, public: bytes, info: bytes, count: int) -> Integers:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MaskingError("a key of the cohort is not an X25519 key") from error
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(shared)
    # The key is used once, so the nonce need not vary.
    cipher = Cipher(algorithms.ChaCha20(key, b"\0" * 16), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * count)), dtype="<u4").astype(np.uint32)


def unmask_sum(masked: Iterable[Integers]) -> NDArray[np.int64]:
    """The sum of the integers of all sites of a cohort, in -2^31 .. 2^31 - 1: the masks cancel.

    Raises:
        MaskingError: there is none.
    """
    total: Integers | None = None
    for one in masked:
        total = one if total is None else total + one
    if total is None:
        raise MaskingError("there is no masked reply to sum")
    return total.astype(np.uint32).view(np.int32).astype(np.int64)
