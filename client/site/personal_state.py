"""A site's own part of the shift: kept in a file of the site's, never sent."""

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
    """A file of personal values that is damaged or belongs to something else; the text says what to do."""


def read_personal_values(
    path: Path, partition: ParameterPartition, fingerprint: Fingerprint, *, study: str, run: str
) -> tuple[int, Vector, Vector]:
    """Read a file of personal values.

    Args:
        path: of the file.
        split, fingerprint: of the adapted model that the values are for.
        study, run: its name, and the key of the server's run folder.

    Returns:
        The round that was trained last, the values before it and after it, (split.personal_size,) each.

    Raises:
        PersonalError: it is missing, damaged, or of another study, run, backbone or split.
    """
    try:
        with safe_open(path, framework="np") as file:
            told = file.metadata() or {}
            if told.get("format") != FORMAT or set(file.keys()) != {"before", "after"}:
                raise PersonalError(f"{path} is no file of personal values: name the one that a site wrote")
            before, after = (file.get_tensor(name) for name in ("before", "after"))
    except (SafetensorError, OSError) as error:
        raise PersonalError(
            f"{path} cannot be read ({error}): name the file that the site wrote, or put back a backup"
        ) from error
    for what, wanted in (("study", study), ("run", run)):
        if told.get(what) != wanted:
            raise PersonalError(
                f"{path} holds the values of {what} {told.get(what)!r}, this one's {what} is {wanted!r}: name"
                " the file of the same study and run"
            )
    if told.get("layout") != partition.full.digest or told.get("shared") != partition.shared.digest:
        raise PersonalError(f"{path} was made with other parts personal: it does not fit this study")
    if told.get("weights") != _weights(fingerprint):
        raise PersonalError(f"{path} was trained on another backbone: it does not fit this study")
    for values in (before, after):
        fits = values.shape == (partition.personal_size,) and values.dtype == np.float32
        if not fits or not bool(np.isfinite(values).all()):
            raise PersonalError(f"{path} holds no {partition.personal_size} finite values: put back a backup")
    if not told.get("round", "").isdecimal():
        raise PersonalError(f"{path} says round {told.get('round')!r}, expected a whole number")
    return int(told["round"]), before, after


def safe_name(name: str) -> str:
    """A name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)


def _weights(fingerprint: Fingerprint) -> str:
    return hashlib.sha256(fingerprint.weights.encode()).hexdigest()


class PersonalState:
    """The personal values of one site in one run of a study.

    The values before the last round are kept beside those after it: a round that is asked for again starts
    from where it started.

    Args:
        folder: of the site.
        study: its name.
        run: the key of the server's run folder, the same after an interruption.
        split: says how many values there are.
        fingerprint: of the site's backbone.
    """

    def __init__(
        self, folder: Path, *, study: str, run: str, partition: ParameterPartition, fingerprint: Fingerprint
    ) -> None:
        self.path = folder / f"{safe_name(study)}-{run}.safetensors"
        self._study, self._run = study, run
        self._partition, self._fingerprint = partition, fingerprint

    def current(self) -> Vector:
        """The values after the last round; zeros before the first."""
        return self._read()[2]

    def initial(self, round: int) -> Vector:
        """The values that a round starts from."""
        last, before, after = self._read()
        if round == 1:
            return np.zeros(self._partition.personal_size, np.float32)
        if not last and self._partition.personal_size:
            log.warning("round %s finds no personal values in %s and starts from zeros", round, self.path)
        if round < last:
            log.warning("round %s is asked for, the personal values are those after round %s", round, last)
        return before if round == last else after

    def store(self, before: Vector, after: Vector, *, round: int) -> None:
        """Keep what a round has made of the values.

        Raises:
            OSError: they cannot be written; the round's reply must then not be sent.
        """
        told: dict[str, Any] = {
            "format": FORMAT,
            "layout": self._partition.full.digest,
            "shared": self._partition.shared.digest,
            "weights": _weights(self._fingerprint),
            "study": self._study,
            "run": self._run,
            "round": str(round),
        }
        arrays = {"before": before.astype(np.float32), "after": after.astype(np.float32)}
        write_atomic(self.path, save(arrays, metadata=told))

    def _read(self) -> tuple[int, Vector, Vector]:
        if self._partition.personal_size == 0 or not self.path.exists():
            zeros = np.zeros(self._partition.personal_size, np.float32)
            return 0, zeros, zeros
        return read_personal_values(
            self.path, self._partition, self._fingerprint, study=self._study, run=self._run
        )
