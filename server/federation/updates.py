"""The updates of one round: received one at a time, validated, and spooled to disk.

A reply is released once its update is on disk, so that memory does not grow with the number of sites. What a
mean needs is read back one update at a time, in a fixed order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.server.federation.messenger import SiteReply, in_order
from fedsigma.server.federation.validation import (
    InvalidReply,
    ValidUpdate,
    find_norm_outliers,
    validate_update,
)

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["CollectedUpdates", "UpdateBuffer", "UpdateBufferError", "collect_updates"]

Vector = NDArray[np.float32]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class CollectedUpdates:
    """What the sites of a round replied, by node and in the order in which the tasks were sent.

    Attributes:
        replies: Every site's reply, without its record.
        accepted: The valid replies; their updates are in the buffer.
        rejected: Why the other replies are invalid.
    """

    replies: dict[int, SiteReply]
    accepted: dict[int, ValidUpdate] = field(default_factory=dict)
    rejected: dict[int, InvalidReply] = field(default_factory=dict)

    @property
    def lost(self) -> frozenset[int]:
        """The nodes whose connection or machine was lost."""
        return frozenset(node for node, reply in self.replies.items() if reply.connection_lost)

    def scaled(self, factors: Mapping[int, float]) -> CollectedUpdates:
        """The same with each site's weight multiplied by its factor."""
        accepted = {
            node: replace(update, weight=update.weight * factors[node])
            for node, update in self.accepted.items()
        }
        return replace(self, accepted=accepted)


def collect_updates(
    replies: Iterable[SiteReply],
    buffer: UpdateBuffer[int],
    *,
    nodes: Iterable[int],
    study: StudyConfig,
    layout: Layout,
    shift: Vector,
) -> CollectedUpdates:
    """Validate the replies of a round as they arrive and spool their updates.

    Args:
        replies: One for each node that was sent a task.
        buffer: Receives the update of each reply that is valid by itself.
        nodes: The nodes, in the order of the result.
        study: The study, with its bounds.
        layout: The layout of the shared values.
        shift: The global shift that the sites started from, shape (values,).
    """
    received: dict[int, SiteReply] = {}
    accepted: dict[int, ValidUpdate] = {}
    rejected: dict[int, InvalidReply] = {}
    for reply in replies:
        node = reply.node
        received[node] = reply.emptied()
        if reply.content is not None:
            try:
                accepted[node], update = validate_update(
                    reply.content,
                    study=study,
                    layout=layout,
                    start=shift,
                    codec=study.federation.codec,
                    steps=study.training.local_steps,
                )
                buffer.put(node, update)
            except InvalidReply as error:
                # Its traceback would keep the reply in memory.
                rejected[node] = InvalidReply(str(error))
        del reply  # the loop variable would keep it in memory while the next one is awaited
    # Where whole sites are protected, updates are clipped instead: the norm of one site's update must not
    # decide whether another's is accepted.
    factor = None if study.privacy.of_sites else study.federation.norm_factor
    for node, reason in find_norm_outliers(accepted, factor).items():
        rejected[node] = InvalidReply(reason)
        del accepted[node]
    ordered = in_order(nodes, received.values())
    return CollectedUpdates(
        replies=ordered,
        accepted={node: accepted[node] for node in ordered if node in accepted},
        rejected=rejected,
    )


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
        left = values.view(np.uint8).data
        try:
            self._file.seek(slot * left.nbytes)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise UpdateBufferError(
                f"the disk of {self._folder} cannot store the sites' updates ({error.strerror}): a round"
                f" needs {4 * self._size:,} bytes there for each site. Make room and resume the run"
            ) from error
        self._slots[key] = slot

    def __getitem__(self, key: K) -> Vector:
        """A copy of the vector, shape (size,)."""
        values = np.empty(self._size, np.float32)
        left = values.view(np.uint8).data
        self._file.seek(self._slots[key] * left.nbytes)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise UpdateBufferError(f"the disk of {self._folder} lost a site's update: resume the run")
            left = left[count:]
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
