"""The replies of one round, taken one by one: each is checked, its change put on disk, and let go.

So a round needs no more memory for more sites, but for a few numbers of each. What a mean needs of the
changes is then read back one at a time, in a fixed order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from flwr.app import Message
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

__all__ = ["CollectedUpdates", "RoundOutcome", "UpdateBuffer", "UpdateBufferError", "collect_updates"]


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """What a round came to.

    messages: what the inner strategy is to average, empty if too few replies count. sites: those that count,
    by name. lost: the nodes of sites that were lost to their network or machine. images: what sites told.
    """

    messages: list[Message]
    sites: list[str]
    lost: frozenset[int]
    images: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CollectedUpdates:
    """What came of each site that was asked, in the order in which they were asked.

    answers: without their records. accepted, rejected: of the replies that there were.
    """

    answers: dict[int, SiteReply]
    accepted: dict[int, ValidUpdate]
    rejected: dict[int, InvalidReply]


def collect_updates(
    answers: Iterable[SiteReply],
    changes: UpdateBuffer[int],
    *,
    nodes: Iterable[int],
    study: StudyConfig,
    layout: Layout,
    start: NDArray[np.float32],
) -> CollectedUpdates:
    """Take the answers of a round as they come.

    Args:
        answers: one of each site that was asked.
        changes: where the changes of replies that are in order by themselves are put.
        nodes: the sites that were asked, in order.
        study, layout, start: see `validate_update`.
    """
    seen: dict[int, SiteReply] = {}
    accepted: dict[int, ValidUpdate] = {}
    rejected: dict[int, InvalidReply] = {}
    for answer in answers:
        node = answer.node
        seen[node] = answer.emptied()
        if answer.content is not None:
            try:
                accepted[node], change = validate_update(
                    answer.content,
                    study=study,
                    layout=layout,
                    start=start,
                    codec=study.federation.codec,
                    steps=study.training.local_steps,
                )
                changes.put(node, change)
            except InvalidReply as error:
                # Its traceback would hold the reply.
                rejected[node] = InvalidReply(str(error))
        del answer  # the loop would hold it while the next one is waited for
    # Where whole sites are hidden a change is clipped instead: one site's length must not decide whether
    # another's change counts.
    factor = None if study.privacy.of_sites else study.federation.norm_factor
    for node, reason in find_norm_outliers(accepted, factor).items():
        rejected[node] = InvalidReply(reason)
        del accepted[node]
    ordered = in_order(nodes, seen.values())
    return CollectedUpdates(
        answers=ordered,
        accepted={node: accepted[node] for node in ordered if node in accepted},
        rejected=rejected,
    )


Vector = NDArray[np.float32]
K = TypeVar("K", bound=Hashable)


class UpdateBufferError(FedSigmaError, OSError):
    """A vector cannot be kept, or not read back."""


class UpdateBuffer(Mapping[K, Vector]):
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
            raise UpdateBufferError(f"a vector of shape {values.shape} came, expected ({self._size},)")
        place = self._places.get(key, len(self._places))
        left = values.view(np.uint8).data
        try:
            self._file.seek(place * left.nbytes)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise UpdateBufferError(
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
                raise UpdateBufferError(f"the disk of {self._folder} lost what a site sent: resume the run")
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
