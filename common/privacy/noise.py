"""Secure random numbers, and noise of differential privacy at the level of sites.

The numbers are ChaCha20 under a key from the operating system. A generator such as torch's is not safe: its
state, and with it all the noise, can be computed from some hundred outputs.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedsigma.common.config.privacy import PrivacyConfig


class SecureRandom:
    """A stream of random numbers.

    Args:
        key: 32 bytes, for tests; the same key gives the same stream. By default from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        # The key is used for one stream only, so the nonce need not vary.
        cipher = algorithms.ChaCha20(secrets.token_bytes(32) if key is None else key, b"\0" * 16)
        self._stream = Cipher(cipher, mode=None).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1], each a multiple of 2^-53 (count,)."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return ((bits >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers (count,).

        Each is the sum of four by Box and Muller, halved. One alone has gaps between its floating-point
        values that reveal the noiseless value; four do not (Holohan and Braghin 2021, arXiv:2107.10138).
        """
        halves = 2 * count
        radius = np.sqrt(-2 * np.log(self.uniform(halves)))
        angle = 2 * np.pi * self.uniform(halves)
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        halved: NDArray[np.float64] = normal.reshape(4, count).sum(0) / 2
        return halved

    def sample(self, count: int, rate: float) -> list[int]:
        """A Poisson sample of 0 to count - 1: each is in it with the probability `rate`, independently."""
        return np.flatnonzero(self.uniform(count) <= rate).tolist()


def clip(update: NDArray[np.floating], norm: float) -> NDArray[np.float64]:
    """Scale an update (values,) to an L2 norm of at most `norm`; zeros if its norm is not finite."""
    x = np.asarray(update, dtype=np.float64)
    length = float(np.linalg.norm(x))
    return x * (norm / max(length, norm)) if math.isfinite(length) else np.zeros_like(x)


def noisy_mean(
    updates: Iterable[NDArray[np.floating]], privacy: PrivacyConfig, randomness: SecureRandom | None = None
) -> NDArray[np.float64]:
    """The mean of the sites' clipped updates, at least one, with noise that hides any one site (values,).

    The noise on the sum has the standard deviation noise_multiplier times clip_norm (McMahan et al. 2018,
    arXiv:1710.06963, with equal weights and every site in each round).
    """
    total, count = np.zeros(1), 0
    for update in updates:  # an iterator: updates may be read from disk
        total, count = total + clip(update, privacy.clip_norm), count + 1
    total += (randomness or SecureRandom()).normal(total.size) * privacy.noise_multiplier * privacy.clip_norm
    return total / count


def shared_noise(
    update: NDArray[np.floating],
    privacy: PrivacyConfig,
    *,
    sites: int,
    randomness: SecureRandom | None = None,
) -> NDArray[np.float32]:
    """One site's clipped update with its share of the noise (values,).

    The sum over all sites has the noise of `noisy_mean`. If k sites reveal their shares, the other shares
    still hide a site, with sqrt((sites - k) / sites) of the noise.
    """
    deviation = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(sites)
    noise = (randomness or SecureRandom()).normal(np.size(update)) * deviation
    return (clip(update, privacy.clip_norm) + noise).astype(np.float32)
