"""A site's personal part of the shift, stored in a file of the site and never sent."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic

if TYPE_CHECKING:
    from fedsigma.common.sigma import Fingerprint, ParameterPartition

__all__ = ["FORMAT", "PersonalError", "PersonalState", "read_personal_values", "safe_name"]

FORMAT = "fedsigma-personal-1"
Vector = NDArray[np.float32]
log = logging.getLogger("fedsigma.client")


class PersonalError(FedSigmaError, ValueError):
    """A file of personal values is damaged, or belongs to another study, run or backbone."""


def read_personal_values(
    path: Path, partition: ParameterPartition, fingerprint: Fingerprint, *, study: str, run: str
) -> tuple[int, Vector, Vector]:
    """Read a file of personal values.

    Returns:
        The last trained round, and the values before and after it, each of shape
        (partition.personal_size,).

    Raises:
        PersonalError: The file is missing or damaged, or belongs to another study, run, backbone or
            partition.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or set(file.keys()) != {"before", "after"}:
                raise PersonalError(f"{path} is not a file of personal values")
            before, after = (file.get_tensor(name) for name in ("before", "after"))
    except (SafetensorError, OSError) as error:
        raise PersonalError(f"{path} cannot be read ({error}): restore it from a backup") from error
    for key, expected in (("study", study), ("run", run)):
        if metadata.get(key) != expected:
            raise PersonalError(
                f"{path} holds the values of {key} {metadata.get(key)!r}, expected"
                f" {key} {expected!r}: name the file of the same study and run"
            )
    if (metadata.get("layout"), metadata.get("shared")) != (partition.full.digest, partition.shared.digest):
        raise PersonalError(f"{path} has other personal parts than this study")
    if metadata.get("weights") != _digest_weights(fingerprint):
        raise PersonalError(f"{path} was trained on another backbone than this study's")
    size = partition.personal_size
    arrays = (before, after)
    if not all(a.shape == (size,) and a.dtype == np.float32 and np.isfinite(a).all() for a in arrays):
        raise PersonalError(f"{path}: expected {size} finite float32 values; restore it from a backup")
    if not metadata.get("round", "").isdecimal():
        raise PersonalError(f"{path}: round is {metadata.get('round')!r}, expected a whole number")
    return int(metadata["round"]), before, after


def safe_name(name: str) -> str:
    """Replace each character of a name that is not safe in a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)


def _digest_weights(fingerprint: Fingerprint) -> str:
    return hashlib.sha256(fingerprint.weights.encode()).hexdigest()


class PersonalState:
    """The personal values of one site in one run of a study.

    The file holds the values before and after the last round, so that a retried round starts from the same
    values.

    Args:
        folder: Folder of the site's personal values.
        study: Name of the study.
        run: Key of the server's run folder, the same for a resumed run.
        partition: Partition of the adapted model's parameters.
        fingerprint: Fingerprint of the adapted model.
    """

    def __init__(
        self, folder: Path, *, study: str, run: str, partition: ParameterPartition, fingerprint: Fingerprint
    ) -> None:
        self.path = folder / f"{safe_name(study)}-{run}.safetensors"
        self._study, self._run = study, run
        self._partition, self._fingerprint = partition, fingerprint

    def current(self) -> Vector:
        """Return the values after the last round; zeros before the first."""
        return self._read()[2]

    def initial(self, round: int) -> Vector:
        """Return the values that a round starts from."""
        last, before, after = self._read()
        if round == 1:
            return np.zeros(self._partition.personal_size, np.float32)
        if not last and self._partition.personal_size:
            log.warning("round %s: no personal values in %s, starting from zeros", round, self.path)
        if round < last:
            log.warning("round %s is trained with the personal values after round %s", round, last)
        return before if round == last else after

    def store(self, before: Vector, after: Vector, *, round: int) -> None:
        """Write the values before and after a round.

        Raises:
            OSError: They cannot be written; the round's reply must not be sent.
        """
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "layout": self._partition.full.digest,
            "shared": self._partition.shared.digest,
            "weights": _digest_weights(self._fingerprint),
            "study": self._study,
            "run": self._run,
            "round": str(round),
        }
        arrays = {"before": before.astype(np.float32), "after": after.astype(np.float32)}
        write_atomic(self.path, save(arrays, metadata=metadata))

    def _read(self) -> tuple[int, Vector, Vector]:
        if self._partition.personal_size == 0 or not self.path.exists():
            zeros = np.zeros(self._partition.personal_size, np.float32)
            return 0, zeros, zeros
        partition, fingerprint = self._partition, self._fingerprint
        return read_personal_values(self.path, partition, fingerprint, study=self._study, run=self._run)
