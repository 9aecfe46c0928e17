"""Random numbers that nobody can predict or repeat: for noise and for samples that have to stay secret.

ChaCha20 under a key from the operating system. A generator such as torch's would not do: its state follows
from some hundred outputs, and with it all the noise.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fedsigma.common.config.privacy import PrivacyConfig

__all__ = ["SecureRandom", "clip", "noisy_mean", "shared_noise"]


class SecureRandom:
    """A stream of random numbers.

    Args:
        key: 32 bytes; the same key gives the same stream. By default new ones from the operating system,
            which is what everything but a test wants.
    """

    def __init__(self, key: bytes | None = None) -> None:
        chosen = secrets.token_bytes(32) if key is None else key
        # The key is used for one stream only, so the nonce need not vary.
        self._stream = Cipher(algorithms.ChaCha20(chosen, b"\0" * 16), mode=None).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in (0, 1], each a multiple of 2^-53 (count,)."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers (count,).

        Each is the sum of four by Box and Muller, halved. One alone has gaps between the values that floating
        point can reach, from which the noiseless value can be told; with four the search is hopeless
        (Holohan and Braghin 2021, arXiv:2107.10138).
        """
        halves = 2 * count
        radius = np.sqrt(-2 * np.log(self.uniform(halves)))
        angle = 2 * np.pi * self.uniform(halves)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both.reshape(4, count).sum(0) / 2

    def sample(self, count: int, rate: float) -> list[int]:
        """A Poisson sample: of the numbers 0 to count - 1 each with the probability `rate`, by itself."""
        return np.flatnonzero(self.uniform(count) <= rate).tolist()


def clip(change: NDArray[np.floating], norm: float) -> NDArray[np.float64]:
    """A change (values,) shortened to a length of at most `norm`; zeros if its length is not finite."""
    x = np.asarray(change, dtype=np.float64)
    length = float(np.linalg.norm(x))
    return x * (norm / max(length, norm)) if math.isfinite(length) else np.zeros_like(x)


def noisy_mean(
    changes: Iterable[NDArray[np.floating]], privacy: PrivacyConfig, randomness: SecureRandom | None = None
) -> NDArray[np.float64]:
    """The mean of the sites' clipped changes, at least one, with noise that hides any one site (values,).

    The noise on the sum has the standard deviation noise_multiplier times clip_norm (McMahan et al. 2018,
    arXiv:1710.06963, with equal weights and every site in each round).
    """
    total, count = np.zeros(1), 0
    for change in changes:  # one by one: they may lie on disk
        total, count = total + clip(change, privacy.clip_norm), count + 1
    total += (randomness or SecureRandom()).normal(total.size) * privacy.noise_multiplier * privacy.clip_norm
    return total / count


def shared_noise(
    change: NDArray[np.floating],
    privacy: PrivacyConfig,
    *,
    sites: int,
    randomness: SecureRandom | None = None,
) -> NDArray[np.float32]:
    """One site's clipped change with its share of the noise (values,).

    The sum of what so many sites send has the noise of `noisy_mean`'s; of k sites that tell theirs, the rest
    still hides a site, by sqrt((sites - k) / sites) of it.
    """
    deviation = privacy.noise_multiplier * privacy.clip_norm / math.sqrt(sites)
    noise = (randomness or SecureRandom()).normal(np.size(change)) * deviation
    return (clip(change, privacy.clip_norm) + noise).astype(np.float32)
