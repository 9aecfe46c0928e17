"""A round of which the server learns the sum only: what is asked, and what is read of the replies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.privacy.secure_aggregation import Member, scale_for, unmask_sum
from fedsigma.common.wire.records import (
    LOSS_UNIT,
    MASKED_COUNTS,
    MaskedReply,
    ProtocolError,
    TrainTask,
    from_record,
)
from fedsigma.server.federation.messenger import SiteReply
from fedsigma.server.federation.validation import InvalidReply

if TYPE_CHECKING:
    from fedsigma.common.sigma import Layout

__all__ = ["MaskedSum", "MaskedSumBuilder", "most_examples", "read_masked", "task_for"]


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """What the server learns of a round.

    Shapes: change (layout size,), the weighted mean. Sums over the cohort: examples, loss (the mean over the
    images; nan, for untold, where the study is private), test_examples and right answers.
    """

    change: NDArray[np.float64]
    examples: int
    loss: float
    test_examples: int
    right: int

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars by name, as of one site."""
        told = {"examples": float(self.examples), "test_examples": float(self.test_examples)}
        told |= {} if math.isnan(self.loss) else {"loss": self.loss}
        return told | ({"accuracy": self.right / self.test_examples} if self.test_examples else {})


def most_examples(study: StudyConfig) -> int:
    """The most images that a site counts for; one where it counts like every other site."""
    if study.privacy.of_sites:
        return 1
    return min(study.max_examples_per_site, study.federation.max_examples or study.max_examples_per_site)


def task_for(
    task: TrainTask, members: Mapping[int, Member], study: StudyConfig, *, attempt: int
) -> TrainTask:
    """The task of a round for one cohort of it."""
    return replace(
        task,
        cohort=len(members),
        members=tuple(sorted(members.values(), key=lambda one: one.name)),
        attempt=attempt,
        bound=study.federation.mask_bound,
        most_examples=most_examples(study),
    )


class MaskedSumBuilder:
    """The answers of a masked cohort, added up as they come: of each reply nothing is kept but its part.

    Attributes: answers, without their records; added, the sites whose replies are in the sum; rejected, why
    the others' are not, by site.
    """

    def __init__(self, layout: Layout, *, steps: int) -> None:
        self.answers: dict[int, SiteReply] = {}
        self.added: set[int] = set()
        self.rejected: dict[int, InvalidReply] = {}
        self._layout, self._steps = layout, steps
        self._total: NDArray[np.uint32] | None = None

    def take(self, answer: SiteReply) -> None:
        """Add a reply that is in order by itself to the sum, and keep why one is not."""
        self.answers[answer.node] = answer.emptied()
        if answer.content is None:
            return
        try:
            part = read_masked(answer.content, self._layout, steps=self._steps)
        except InvalidReply as error:
            self.rejected[answer.node] = InvalidReply(str(error))  # the traceback would hold the reply
            return
        if self._total is None:
            self._total = np.zeros_like(part)
        self._total += part  # modulo 2^32, as masks are
        self.added.add(answer.node)

    def sum(self, task: TrainTask) -> MaskedSum:
        """What the sum of a whole cohort says; at least one reply was added.

        Raises:
            Rejected: the counts cannot be sums of honest replies: a site has sent something else.
        """
        return _read_sum(unmask_sum([] if self._total is None else [self._total]), task, self._layout)


def read_masked(content: Any, layout: Layout, *, steps: int) -> NDArray[np.uint32]:
    """The integers of a masked reply (layout size and one for each of `MASKED_COUNTS`,).

    Raises:
        Rejected: it is not in order.
    """
    try:
        reply = from_record(MaskedReply, content)
    except ProtocolError as error:
        raise InvalidReply(str(error)) from error
    wanted = 4 * (layout.size + len(MASKED_COUNTS))
    if len(reply.masked) != wanted:
        raise InvalidReply(f"the masked reply has {len(reply.masked)} bytes, expected {wanted}")
    if reply.steps > steps:
        raise InvalidReply(f"{reply.steps} steps were taken, {steps} were asked for")
    return np.frombuffer(reply.masked, "<u4")


def _read_sum(total: NDArray[np.int64], task: TrainTask, layout: Layout) -> MaskedSum:
    values, counts = total[: layout.size], total[layout.size :]
    examples, loss, test_examples, right = (int(count) for count in counts)
    sites = len(task.members)
    if not sites <= examples <= sites * task.most_examples or not 0 <= right <= test_examples or loss < 0:
        raise InvalidReply(
            f"the masked sum counts {examples} images, {right} of {test_examples} right and a loss of {loss}:"
            " a site of the cohort has sent something else than its mask allows"
        )
    scale = scale_for(bound=task.bound, weights=sites * task.most_examples)
    return MaskedSum(
        change=values / scale / examples,
        examples=examples,
        loss=math.nan if task.privacy.level != "none" else loss / LOSS_UNIT / examples,
        test_examples=test_examples,
        right=right,
    )
