"""Vectors kept on disk instead of in memory, as many as there are sites."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Vectors", "VectorsError"]

Vector = NDArray[np.float32]
K = TypeVar("K", bound=Hashable)


class VectorsError(OSError):
    """A vector cannot be kept, or not read back."""


class Vectors(Mapping[K, Vector]):
    """Vectors of one size by key, in the order in which they first came; reading one reads it from the file.

    The file has no name and is gone with the process, however that ends.

    Args:
        size: the number of values of each vector, float32.
        folder: on whose disk the file lies; it takes 4 * size bytes a vector.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._places: dict[K, int] = {}

    def put(self, key: K, vector: NDArray[np.floating]) -> None:
        """Keep a vector (size,), in place of an earlier one of this key.

        Raises:
            VectorsError: the vector is of another size, or the disk is full or fails.
        """
        values = np.ascontiguousarray(vector, np.float32)
        if values.shape != (self._size,):
            raise VectorsError(f"a vector of shape {values.shape} came, expected ({self._size},)")
        place = self._places.get(key, len(self._places))
        left = values.view(np.uint8).data
        try:
            self._file.seek(place * left.nbytes)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise VectorsError(
                f"the disk of {self._folder} does not take what the sites sent ({error.strerror}): a round"
                f" needs {4 * self._size:,} bytes there for each site. Make room and resume the run"
            ) from error
        self._places[key] = place

    def __getitem__(self, key: K) -> Vector:
        """A copy of the vector (size,); changing it changes nothing else."""
        values = np.empty(self._size, np.float32)
        left = values.view(np.uint8).data
        self._file.seek(self._places[key] * left.nbytes)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise VectorsError(f"the disk of {self._folder} lost what a site sent: resume the run")
            left = left[count:]
        return values

    def __iter__(self) -> Iterator[K]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Give the disk's room back."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening it failed
            self.close()
