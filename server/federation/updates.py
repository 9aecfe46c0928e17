"""The updates of one round: received one at a time, validated, and spooled to disk.

A reply is released once its update is on disk, so that memory does not grow with the number of sites. What a
mean needs is read back one update at a time, in a fixed order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.wire.records import TrainTask
from fedsigma.server.federation.messenger import SiteReply
from fedsigma.server.federation.validation import (
    InvalidReply,
    SiteUpdate,
    l2_norm,
    reject_norm_outliers,
    validate_update,
)

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["UpdateBuffer", "UpdateBufferError", "collect_updates"]

Vector = NDArray[np.float32]
K = TypeVar("K", bound=Hashable)


def collect_updates(
    replies: Iterable[SiteReply],
    buffer: UpdateBuffer[int],
    *,
    sites: Mapping[int, str],
    task: TrainTask,
    study: StudyConfig,
    layout: Layout,
    shift: Vector,
) -> dict[int, SiteUpdate]:
    """Validate the replies of a round as they arrive and spool their updates.

    Args:
        replies: One for each node that was sent the task.
        buffer: Receives the update of each reply that is valid by itself.
        sites: Name of the site of each of these nodes.
        task: The task.
        study: The study, with its bounds.
        layout: The layout of the shared values.
        shift: The global shift that the sites started from, shape (values,).

    Returns:
        The updates by node in the order of `sites`, so that results do not depend on who replied first.
    """
    updates: dict[int, SiteUpdate] = {}
    for reply in replies:
        node = reply.node
        update = updates[node] = SiteUpdate(site=sites[node], reply=replace(reply, content=None))
        if reply.content is not None:
            try:
                update.training, vector, update.shift_norm = validate_update(
                    reply.content, task, study=study, layout=layout, start=shift
                )
                update.update_norm = l2_norm(vector)
                buffer.put(node, vector)
            except InvalidReply as error:  # not kept itself: its traceback would keep the reply in memory
                update.rejection = str(error)
        del reply  # the loop variable would keep it in memory while the next one is awaited
    # Where whole sites are protected, updates are clipped instead: the norm of one site's update must not
    # decide whether another's is accepted.
    if study.federation.norm_factor is not None and not study.privacy.of_sites:
        reject_norm_outliers(updates.values(), study.federation.norm_factor)
    return {node: updates[node] for node in sites}


class UpdateBufferError(FedSigmaError, OSError):
    """An update cannot be spooled to disk or read back."""


class UpdateBuffer(Mapping[K, Vector]):
    """Vectors of one size on disk, by key and in the order in which they were first put.

    Reading an item reads the file. The file has no name and disappears with the process, however that ends.

    Args:
        size: Number of values of each vector, float32.
        folder: A folder on the disk to use; each vector takes 4 * size bytes.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._slots: dict[K, int] = {}

    def put(self, key: K, vector: NDArray[np.floating]) -> None:
        """Store a vector, shape (size,); replaces an earlier one of this key.

        Raises:
            UpdateBufferError: The vector is of another size, or the disk is full or fails.
        """
        values = np.ascontiguousarray(vector, np.float32)
        if values.shape != (self._size,):
            raise UpdateBufferError(f"a vector has shape {values.shape}, expected ({self._size},)")
        slot = self._slots.get(key, len(self._slots))
        data = values.view(np.uint8).data
        try:
            self._file.seek(slot * data.nbytes)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise UpdateBufferError(
                f"the disk of {self._folder} cannot store the sites' updates ({error.strerror}): a round"
                f" needs {4 * self._size:,} bytes there for each site. Make room and resume the run"
            ) from error
        self._slots[key] = slot

    def __getitem__(self, key: K) -> Vector:
        """A copy of the vector, shape (size,)."""
        self._file.seek(4 * self._size * self._slots[key])
        values = np.fromfile(self._file, np.float32, self._size)
        if values.size != self._size:
            raise UpdateBufferError(f"the disk of {self._folder} lost a site's update: resume the run")
        return values

    def __iter__(self) -> Iterator[K]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not if opening it failed
            self.close()
