"""Secure aggregation: pairwise masks, so that a server learns the sum of the sites' updates and no update.

Each pair of sites shares a stream of integers that one adds and the other subtracts, modulo 2^32; in the sum
of all they cancel (Bonawitz et al. 2017, doi:10.1145/3133956.3133982, without its secret sharing: when a site
drops out, the round is repeated without it). The stream comes from an X25519 exchange of keys of one run, by
HKDF bound to run, round, attempt, task and cohort, and ChaCha20. Each key is signed by its site's Ed25519
identity, which the other sites know: a server that forwards keys cannot replace them by its own.
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

_SIGN, _MASK = b"fedsigma mask key v1\0", b"fedsigma mask v2\0"
Integers = NDArray[np.uint32]


class MaskingError(FedSigmaError, ValueError):
    """A key cannot be trusted, or values do not fit the masked sum."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One site of a cohort.

    Attributes:
        name: the site's name.
        key: its X25519 public key for this run, 32 bytes.
        signature: of the key, by the site's identity.
    """

    name: str
    key: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class MaskContext:
    """The purpose of one mask. Two masks of the same pair of sites are equal only if their contexts are.

    Two different vectors under one mask would reveal their difference. So everything that shapes a site's
    vector is part of the context.

    Attributes:
        run: number of the run.
        round: number of the round.
        attempt: number of the attempt in this round.
        members: the cohort, in the order of their names.
        bound: largest magnitude of a value; with most_examples, it sets the scale.
        most_examples: largest weight of a site.
        task: SHA-256 of the whole task, with its settings, shift and privacy.
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
        """The factor of weighted values, see `scale_for`."""
        return scale_for(bound=self.bound, weights=len(self.members) * self.most_examples)

    @property
    def cohort(self) -> bytes:
        """SHA-256 of the members' names and keys, in order (32 bytes)."""
        digest = hashlib.sha256()
        for member in self.members:
            name = member.name.encode()
            digest.update(struct.pack("<I", len(name)) + name + member.key)
        return digest.digest()

    @property
    def info(self) -> bytes:
        """The context as HKDF's info."""
        numbers = struct.pack("<QQQdQ", self.run, self.round, self.attempt, self.bound, self.most_examples)
        return _MASK + numbers + self.task + self.cohort


def _signed(run: int, name: str, key: bytes) -> bytes:
    return _SIGN + struct.pack("<Q", run) + key + name.encode()


def sign(identity: Ed25519PrivateKey, *, run: int, name: str, key: bytes) -> Member:
    """A site's own entry in a cohort, with its signed key of this run."""
    return Member(name=name, key=key, signature=identity.sign(_signed(run, name, key)))


def check_members(context: MaskContext, identities: Mapping[str, bytes], *, me: str, key: bytes) -> None:
    """Check that the keys of a cohort are those of known sites.

    Args:
        context: the context, with the members as the server named them.
        identities: the Ed25519 public key (32 bytes) of each site that this one knows.
        me: this site's name.
        key: this site's X25519 public key of this run, 32 bytes.

    Raises:
        MaskingError: a site is unknown, named twice or out of order, a signature is invalid, or this site is
            not among the members with its own key.
    """
    names = [member.name for member in context.members]
    if names != sorted(set(names)):
        raise MaskingError("the cohort names a site twice or out of order")
    if (me, key) not in [(member.name, member.key) for member in context.members]:
        raise MaskingError("this site is not in the cohort with the key that it sent")
    for member in context.members:
        if member.name not in identities:
            raise MaskingError(f"site '{member.name}' is not among the sites that this one knows")
        try:
            identity = Ed25519PublicKey.from_public_bytes(identities[member.name])
            identity.verify(member.signature, _signed(context.run, member.name, member.key))
        except (InvalidSignature, ValueError) as error:
            raise MaskingError(f"the key of site '{member.name}' is not signed by that site") from error


def scale_for(*, bound: float, weights: float) -> float:
    """The largest power of two by which weighted values can be multiplied without overflow of their sum.

    The sum over the sites of round(weight * value * scale) is at most bound * weights * scale plus a half for
    each site, and must stay below 2^31; 2^30 leaves room for the halves of up to 2^31 sites.

    Args:
        bound: the largest magnitude of a value.
        weights: the largest sum of the weights of all sites.

    Raises:
        MaskingError: the unscaled values do not fit.
    """
    scale = 2.0 ** math.floor(math.log2(2**30 / (bound * weights)))
    if scale < 1:
        raise MaskingError(f"values up to {bound:g} with weights of {weights:g} do not fit 32 bits")
    return scale


def to_integers(values: NDArray[np.floating], *, weight: float, scale: float, bound: float) -> Integers:
    """round(weight * value * scale) modulo 2^32.

    Raises:
        MaskingError: a value is not finite or above the bound: it would overflow the sum silently.
    """
    x = np.asarray(values, dtype=np.float64)
    if not bool((np.abs(x) <= bound).all()):
        raise MaskingError(f"a value is above {bound:g}, for which the masked sum has no room")
    return np.rint(x * weight * scale).astype(np.int64).astype(np.uint32)


def mask(integers: Integers, context: MaskContext, *, me: str, private: X25519PrivateKey) -> Integers:
    """Add the stream shared with each site after this one in the cohort, and subtract that of each before."""
    masked = integers.copy()
    for member in context.members:
        if member.name != me:
            stream = _stream(private, member.key, context.info, integers.size)
            masked = masked + stream if me < member.name else masked - stream
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
        MaskingError: there are no masked integers.
    """
    replies = iter(masked)
    total = next(replies, None)
    if total is None:
        raise MaskingError("there is no masked reply to sum")
    for integers in replies:
        total = total + integers
    return total.astype(np.uint32).view(np.int32).astype(np.int64)
