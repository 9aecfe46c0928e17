"""A round of which the server learns the sum alone: its tasks, and the sum of the masked replies."""

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

__all__ = ["MaskedSum", "MaskedSumBuilder", "masked_task", "max_counted_examples", "read_masked"]


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """What the server learns of a masked round.

    Attributes:
        mean: The weighted mean update, shape (values,).
        examples: Training images of the cohort.
        loss: Mean training loss over these images; nan where training is private.
        test_examples: Test images of the cohort.
        correct: Correct predictions on these.
    """

    mean: NDArray[np.float64]
    examples: int
    loss: float
    test_examples: int
    correct: int

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars by the names of rounds.csv."""
        metrics = {"examples": float(self.examples), "test_examples": float(self.test_examples)}
        if not math.isnan(self.loss):
            metrics["loss"] = self.loss
        if self.test_examples:
            metrics["accuracy"] = self.correct / self.test_examples
        return metrics


def max_counted_examples(study: StudyConfig) -> int:
    """The largest weight of a site; 1 where all sites have the same."""
    if study.privacy.of_sites:
        return 1
    return min(study.max_examples_per_site, study.federation.max_examples or study.max_examples_per_site)


def masked_task(
    task: TrainTask, members: Mapping[int, Member], study: StudyConfig, *, attempt: int
) -> TrainTask:
    """The task of a round for one cohort.

    Args:
        task: The round's task without masks.
        members: The cohort, with its mask keys, by node.
        study: The study.
        attempt: How many cohorts the round had before this one.
    """
    return replace(
        task,
        cohort=len(members),
        members=tuple(sorted(members.values(), key=lambda member: member.name)),
        attempt=attempt,
        bound=study.federation.mask_bound,
        most_examples=max_counted_examples(study),
    )


class MaskedSumBuilder:
    """Adds up the masked replies of a cohort as they arrive, and releases each.

    Args:
        layout: The layout of the shared values.
        steps: The steps that the sites were asked to train.

    Attributes:
        replies: The replies by node, without their records.
        added: The nodes whose replies are part of the sum.
        rejected: Why the other replies are invalid, by node.
    """

    def __init__(self, layout: Layout, *, steps: int) -> None:
        self.replies: dict[int, SiteReply] = {}
        self.added: set[int] = set()
        self.rejected: dict[int, InvalidReply] = {}
        self._layout, self._steps = layout, steps
        self._total: NDArray[np.uint32] | None = None

    def add(self, reply: SiteReply) -> None:
        """Add a reply to the sum if it is valid by itself, else record why not."""
        self.replies[reply.node] = reply.emptied()
        if reply.content is None:
            return
        try:
            integers = read_masked(reply.content, self._layout, steps=self._steps)
        except InvalidReply as error:
            # Its traceback would keep the reply in memory.
            self.rejected[reply.node] = InvalidReply(str(error))
            return
        if self._total is None:
            self._total = np.zeros_like(integers)
        self._total += integers  # modulo 2^32, like the masks
        self.added.add(reply.node)

    def sum(self, task: TrainTask) -> MaskedSum:
        """Read the sum of a complete cohort; at least one reply was added.

        Raises:
            InvalidReply: The counts cannot be sums of honest replies.
        """
        return _read_sum(unmask_sum([] if self._total is None else [self._total]), task, self._layout)


def read_masked(content: Any, layout: Layout, *, steps: int) -> NDArray[np.uint32]:
    """Read the integers of a masked reply, shape (values + len(MASKED_COUNTS),).

    Raises:
        InvalidReply: Its form, length or number of steps is invalid.
    """
    try:
        reply = from_record(MaskedReply, content)
    except ProtocolError as error:
        raise InvalidReply(str(error)) from error
    expected = 4 * (layout.size + len(MASKED_COUNTS))
    if len(reply.masked) != expected:
        raise InvalidReply(f"the masked reply has {len(reply.masked)} bytes, expected {expected}")
    if reply.steps > steps:
        raise InvalidReply(f"{reply.steps} steps were trained, the task asked for {steps}")
    return np.frombuffer(reply.masked, "<u4")


def _read_sum(total: NDArray[np.int64], task: TrainTask, layout: Layout) -> MaskedSum:
    values, counts = total[: layout.size], total[layout.size :]
    examples, loss, test_examples, correct = (int(count) for count in counts)
    sites = len(task.members)
    if not sites <= examples <= sites * task.most_examples or not 0 <= correct <= test_examples or loss < 0:
        raise InvalidReply(
            f"the masked sum counts {examples} images, {correct} of {test_examples} correct and a loss of"
            f" {loss}: a site of the cohort sent other values than it agreed to"
        )
    scale = scale_for(bound=task.bound, weights=sites * task.most_examples)
    return MaskedSum(
        mean=values / scale / examples,
        examples=examples,
        loss=math.nan if task.privacy.level != "none" else loss / LOSS_UNIT / examples,
        test_examples=test_examples,
        correct=correct,
    )
